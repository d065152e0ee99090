"""How groups are cut and the sums behind a swap, against sorted rows and one pair after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esparse import kernels
from esparse.patterns import NM
from esparse.shuffles.lsa import kept_score
from esparse.shuffles.score_swaps import swap_gains, swap_in_blocks
from esparse.shuffles.slot_assignment import assign_slots
from tests.kernels.packed import DEVICE, ON_GPU_TOO

pytest.importorskip("triton")

from esparse.kernels import exchange

pytestmark = ON_GPU_TOO
PATTERNS = [NM(2, 4), NM(1, 2), NM(3, 4), NM(3, 5), NM(4, 8), NM(8, 16)]


def drawn(*size: int, ties: bool = False, seed: int = 0) -> Tensor:
    scores = torch.rand(*size, generator=torch.Generator().manual_seed(seed))
    return ((scores * 4).floor() / 4 if ties else scores).to(DEVICE)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_cut(pattern: NM, rows: int, ties: bool) -> None:
    n, m = pattern.n, pattern.m
    columns_BCR = drawn(2, 3 * m, rows, ties=ties)
    block_K = torch.tensor([0, 1, 1], device=DEVICE)
    channels_KM = torch.stack([torch.randperm(3 * m)[:m] for _ in range(3)]).to(DEVICE)
    kept_K, levels_KRM = exchange.cut(columns_BCR, block_K, channels_KM, n=n)
    for k in range(3):
        scores_MR = columns_BCR[block_K[k], channels_KM[k]].double()
        best_nR = scores_MR.sort(0, descending=True).values[:n]
        assert float(kept_K[k]) == pytest.approx(float(best_nR.sum()), rel=1e-12)
        for slot in range(m):
            others = [s for s in range(m) if s != slot]
            expected_R = scores_MR[others].sort(0, descending=True).values[n - 1]
            assert torch.equal(levels_KRM[k, :, slot].double(), expected_R)


@pytest.mark.parametrize("channels", [1, 33, 300])
@pytest.mark.parametrize("rows", [1, 6, 19, 39])  # tails of four rows, and of a stripe
@pytest.mark.parametrize(("slots", "together"), [(4, 2), (1, 32), (3, 2), (16, 2), (5, 1)])
def test_summed_maxima(slots: int, together: int, rows: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "STRIPE", 16)
    groups = 2 * together + (1 if together == 1 else 0)
    levels_KRM, rows_BRC = drawn(groups, rows, slots), drawn(3, rows, channels, seed=1)
    block_K = torch.tensor([2, 0, 1])[torch.arange(groups) // together].to(DEVICE)
    got = exchange.summed_maxima(levels_KRM, rows_BRC, block_K, together)
    assert got.shape == (groups, slots, channels) and got.dtype == torch.float64
    for k in (0, groups - 1):
        scores_RC = rows_BRC[block_K[k]].double()
        for slot in range(slots):
            expected_C = torch.maximum(levels_KRM[k, :, slot, None].double(), scores_RC).sum(0)
            torch.testing.assert_close(got[k, slot], expected_C, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_long_sums_keep_their_digits() -> None:
    levels_KRM, rows_BRC = drawn(1, 3000, 4), drawn(1, 3000, 32, seed=1)
    got = exchange.summed_maxima(levels_KRM, rows_BRC, torch.zeros(1, dtype=torch.int64, device=DEVICE), 1)[0]
    expected_MC = torch.maximum(levels_KRM[0, :, :, None].double(), rows_BRC[0, :, None].double()).sum(0)
    torch.testing.assert_close(got, expected_MC, rtol=5e-7, atol=0)


def test_nothing_to_do() -> None:
    none_K = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    kept_K, levels_KRM = exchange.cut(drawn(2, 8, 5), none_K, none_K[:, None].expand(-1, 4), n=2)
    assert kept_K.shape == (0,) and levels_KRM.shape == (0, 5, 4)
    assert exchange.summed_maxima(levels_KRM, drawn(2, 5, 8), none_K, 2).shape == (0, 4, 8)


def test_by_hand() -> None:
    """1:2 of the rows (3 1) and (2 5): each keeps its greater one, and each slot's threshold is the other's score."""
    columns_BCR = torch.tensor([[[3.0, 2.0], [1.0, 5.0]]], device=DEVICE)
    zero_K = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    kept_K, levels_KRM = exchange.cut(columns_BCR, zero_K, torch.tensor([[0, 1]], device=DEVICE), n=1)
    assert kept_K.tolist() == [8.0]
    assert levels_KRM.tolist() == [[[1.0, 3.0], [5.0, 2.0]]]
    sums = exchange.summed_maxima(levels_KRM, columns_BCR.mT.contiguous(), zero_K, 1)
    assert sums.tolist() == [[[3 + 5.0, 1 + 5.0], [3 + 2.0, 3 + 5.0]]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gains_are_those_without_kernels(pattern: NM, ties: bool, kernels_everywhere: None) -> None:
    rows_BRC = drawn(2, 40, 3 * pattern.m, ties=ties)
    got = swap_gains(rows_BRC, n=pattern.n, m=pattern.m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton", lambda name, device: None)
        expected = swap_gains(rows_BRC.cpu(), n=pattern.n, m=pattern.m)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.tries(3)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_searches_end_where_they_do_without_kernels(pattern: NM, kernels_everywhere: None) -> None:
    """Rows of integers, so that all sums are exact, and with them every choice."""
    n, m = pattern.n, pattern.m
    width = 5 * m + m // 2
    scores_OI = (drawn(30, width) * 1000).floor()
    own_I = torch.randperm(width - width % m, generator=torch.Generator().manual_seed(0))
    own_I = torch.cat([own_I, torch.arange(width - width % m, width)]).to(DEVICE)
    swapped_I = swap_in_blocks(scores_OI, own_I, n=n, m=m, block=2 * m)
    assigned_I = assign_slots(scores_OI, own_I, n=n, m=m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton", lambda name, device: None)
        assert torch.equal(swapped_I.cpu(), swap_in_blocks(scores_OI.cpu(), own_I.cpu(), n=n, m=m, block=2 * m))
        assert torch.equal(assigned_I.cpu(), assign_slots(scores_OI.cpu(), own_I.cpu(), n=n, m=m))
    assert kept_score(scores_OI, swapped_I, pattern) > kept_score(scores_OI, own_I, pattern)
