"""The sweep through a block of columns in registers, against a loop over rows and columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esparse import kernels
from esparse.patterns import NM, Outliers
from esparse.updates.obs import sweep
from tests.kernels.packed import DEVICE, ON_GPU_TOO

pytest.importorskip("triton")

from esparse.kernels import repair

pytestmark = ON_GPU_TOO


def problem(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and an upper triangular factor with a diagonal that is far from 0, stored column by column."""
    seeded = torch.Generator().manual_seed(seed)
    upper_II = (torch.randn(inputs, inputs, generator=seeded) / inputs**0.5).triu()
    upper_II += (1 + torch.rand(inputs, generator=seeded)).diag()
    return torch.randn(outputs, inputs, generator=seeded).to(DEVICE), upper_II.T.contiguous().T.to(DEVICE)


def swept(
    dense_OI: Tensor, upper_II: Tensor, pattern: NM | None, fixed_OI: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle: algorithm 1 of the paper without any blocks, in float64: weights, mask and errors."""
    weight_OI, upper_II = dense_OI.double().cpu(), upper_II.double().cpu()
    keep_OI = torch.zeros(dense_OI.shape, dtype=torch.bool) if fixed_OI is None else fixed_OI.cpu().clone()
    errors_OI = torch.zeros_like(weight_OI)
    inputs = weight_OI.shape[1]
    for row in range(len(weight_OI)):
        for column in range(inputs):
            if pattern is not None and column % pattern.m == 0:
                group = range(column, min(column + pattern.m, inputs))
                chance = {j: float(weight_OI[row, j] / upper_II[j, j]) ** 2 for j in group}
                count = pattern.kept_per_row(len(group))
                for j in sorted(group, key=lambda j: (-chance[j], j))[:count]:
                    keep_OI[row, j] = True
            if not keep_OI[row, column]:
                errors_OI[row, column] = weight_OI[row, column] / upper_II[column, column]
                weight_OI[row, column:] -= errors_OI[row, column] * upper_II[column, column:]
                weight_OI[row, column] = 0
    return weight_OI, keep_OI, errors_OI


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 5), NM(8, 16), NM(1, 1), None], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(3, 1), (33, 16), (5, 50), (40, 128)])
def test_one_block(outputs: int, inputs: int, pattern: NM | None) -> None:
    dense_OI, upper_II = problem(outputs, inputs)
    given_OI = NM(2, 4).keep_top(torch.rand(outputs, inputs)).to(DEVICE)
    expected = swept(dense_OI, upper_II, pattern, None if pattern else given_OI)
    weight_OI = dense_OI.clone()
    keep_OI = torch.ones_like(given_OI) if pattern else given_OI.clone()
    sizes = (pattern.m, pattern.n, pattern.kept_per_row(inputs % pattern.m)) if pattern else (0, 0, 0)
    errors_OI = repair.sweep_block(weight_OI, keep_OI, upper_II, 0, inputs, *sizes)
    assert torch.equal(keep_OI.cpu(), expected[1])
    torch.testing.assert_close(weight_OI.cpu().double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors_OI.cpu().double(), expected[2], rtol=1e-4, atol=1e-5)


def test_what_is_outside_of_the_block_stays() -> None:
    dense_OI, upper_II = problem(5, 48)
    weight_OI, keep_OI = dense_OI.clone(), torch.ones(5, 48, dtype=torch.bool, device=DEVICE)
    errors_OB = repair.sweep_block(weight_OI, keep_OI, upper_II, 16, 36, 4, 2, 0)
    expected = swept(dense_OI[:, 16:36], upper_II[16:36, 16:36], NM(2, 4), None)
    torch.testing.assert_close(weight_OI[:, 16:36].cpu().double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors_OB.cpu().double(), expected[2], rtol=1e-4, atol=1e-5)
    for outside in (slice(0, 16), slice(36, 48)):
        assert torch.equal(weight_OI[:, outside], dense_OI[:, outside]) and keep_OI[:, outside].all()


def test_by_hand() -> None:
    """1:2 of (2 1): the first stays. Of (2 3) with U_33 = 6 the first stays, the second is worth (3 / 6)^2."""
    dense_OI = torch.tensor([[2.0, 1.0, 2.5, 3.0]], device=DEVICE)
    upper_II = torch.tensor([[1.0, 9, 9, 9], [0, 1, 0.5, 0], [0, 0, 1, 9], [0, 0, 0, 6]], device=DEVICE)
    keep_OI = torch.zeros(1, 4, dtype=torch.bool, device=DEVICE)
    errors_OB = repair.sweep_block(dense_OI, keep_OI, upper_II, 0, 4, 2, 1, 0)
    assert keep_OI.tolist() == [[True, False, True, False]]
    assert dense_OI.tolist() == [[2, 0, 2, 0]]  # 2.5 - 1 * 0.5
    assert errors_OB.tolist() == [[0, 1, 0, 0.5]]


def test_of_equal_chances_the_lowest_index_survives() -> None:
    """Orthogonal channels of one size; of the last group of 2 one survives."""
    weight_OI = torch.tensor([[1.0, 1, 1, 1, 3, 1, 3, 3, 2, 2], [-1.0] * 10], device=DEVICE)
    keep_OI = torch.zeros(2, 10, dtype=torch.bool, device=DEVICE)
    repair.sweep_block(weight_OI, keep_OI, torch.eye(10, device=DEVICE), 0, 10, 4, 2, 1)
    assert keep_OI.int().tolist() == [[1, 1, 0, 0, 1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1, 0, 0, 1, 0]]


@pytest.mark.tries(2)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), NM(8, 16), Outliers(NM(2, 4), NM(2, 16)), None], ids=str)
@pytest.mark.parametrize("block", [1, 20, 128, 300])
def test_the_whole_sweep(pattern: NM | None, block: int, kernels_everywhere: None) -> None:
    dense_OI, upper_II = problem(7, 166)
    fixed_OI = None if pattern else NM(2, 4).keep_top(torch.rand(7, 166)).to(DEVICE)
    weight_OI, keep_OI = sweep(dense_OI, upper_II, pattern or NM(2, 4), fixed_OI, block=block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton", lambda name, device: None)
        plain_OI, plain_keep_OI = sweep(dense_OI, upper_II, pattern or NM(2, 4), fixed_OI, block=block)
    assert torch.equal(keep_OI, plain_keep_OI)
    torch.testing.assert_close(weight_OI, plain_OI, rtol=1e-4, atol=1e-4)
    assert (weight_OI[~keep_OI] == 0).all()
