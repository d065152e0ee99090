"""Sums, extremes and histograms of channels, against one channel after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from esparse.stats import ColumnEntropy, ColumnNorm
from tests.kernels.packed import DEVICE, ON_GPU_TOO

pytest.importorskip("triton")

from esparse.kernels import tally

pytestmark = ON_GPU_TOO
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (7, 130), (300, 5), (513, 128)]  # tails of the tokens, of the parts and of the channels


def inputs(tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    seeded = torch.Generator().manual_seed(tokens)
    return (3 * torch.randn(tokens, channels, generator=seeded) + 1).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), SIZES)
def test_squares_and_extremes(tokens: int, channels: int, dtype: torch.dtype) -> None:
    x_TI = inputs(tokens, channels, dtype)
    least_PI, greatest_PI = tally.extremes(x_TI)
    squares_PI = tally.squares(x_TI)
    for part, x_PI in enumerate(x_TI.double().split(tally.TOKENS)):
        torch.testing.assert_close(squares_PI[part].double(), x_PI.square().sum(0), rtol=1e-6, atol=0)
        assert torch.equal(least_PI[part].double(), x_PI.amin(0))
        assert torch.equal(greatest_PI[part].double(), x_PI.amax(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), SIZES)
@pytest.mark.parametrize("bins", [2, 100])
def test_counts(tokens: int, channels: int, dtype: torch.dtype, bins: int) -> None:
    x_TI = inputs(tokens, channels, dtype)
    low_I = torch.linspace(-4, 0, channels, device=DEVICE)
    scale_I = bins / torch.linspace(2, 9, channels, device=DEVICE)
    counts_KI = torch.ones(bins, channels, dtype=torch.int32, device=DEVICE)
    tally.count(x_TI, low_I, scale_I, counts_KI)
    x, low, scale = (value.float().cpu().numpy() for value in (x_TI, low_I, scale_I))
    for channel in range(channels):
        place = ((x[:, channel] - low[channel]) * scale[channel]).clip(0, bins - 1).astype(int)
        expected = 1 + np.bincount(place, minlength=bins)
        assert counts_KI[:, channel].tolist() == expected.tolist()


def test_counts_by_hand() -> None:
    x_TI = torch.tensor([[-5.0, 0.0], [0.0, 0.5], [0.99, 1.0], [1.0, 7.0], [39.0, 7.0]], device=DEVICE)
    counts_KI = torch.zeros(4, 2, dtype=torch.int32, device=DEVICE)
    tally.count(x_TI, torch.zeros(2, device=DEVICE), torch.tensor([1.0, 0.0], device=DEVICE), counts_KI)
    assert counts_KI.T.tolist() == [[3, 1, 0, 1], [5, 0, 0, 0]]  # a channel that never changes has one bin


def test_rows_may_have_gaps() -> None:
    wide_TI = inputs(20, 64, torch.float32)
    for x_TI in (wide_TI[:, 8:40], wide_TI.T):
        assert torch.equal(tally.squares(x_TI), tally.squares(x_TI.clone(memory_format=torch.contiguous_format)))
        least_PI, _ = tally.extremes(x_TI)
        assert torch.equal(least_PI, x_TI.amin(0, keepdim=True))


@pytest.mark.tries(1)
@pytest.mark.parametrize("bounds", ["channel", "layer", "fixed"])
def test_the_statistics_are_those_without_kernels(bounds: str, kernels_everywhere: None) -> None:
    size = {"inputs": 130, "sequences": 3}
    parts = [inputs(tokens, 130, torch.bfloat16) for tokens in (300, 5, 40)]
    parts[0][:, 3] = parts[1][:, 3] = parts[2][:, 3] = 2.0

    def entropy(device: str) -> ColumnEntropy:
        statistic = ColumnEntropy(bins=100, range=bounds, limit=4.0, **size, device=torch.device(device))
        for pass_index in range(statistic.passes):
            statistic.add_all([x_TI.to(device) for x_TI in parts], pass_index)
        return statistic

    with pytest.MonkeyPatch.context() as patch:
        got = entropy(DEVICE)
        norm = ColumnNorm(**size, device=torch.device(DEVICE))
        for x_TI in parts:
            norm.add(x_TI, 0)
        patch.setattr("esparse.kernels.triton", lambda name, device: None)
        expected = entropy("cpu")
    assert got.tokens == expected.tokens == 345
    assert torch.equal(got.counts_IK.cpu(), expected.counts_IK)
    assert torch.equal(got.low_I.cpu(), expected.low_I) and torch.equal(got.high_I.cpu(), expected.high_I)
    exact_I = torch.cat(parts).double().square().sum(0).sqrt().cpu()
    torch.testing.assert_close(norm.norm_I("total").cpu().double(), exact_I, rtol=1e-6, atol=0)
