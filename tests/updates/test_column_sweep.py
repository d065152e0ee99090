"""The sweep that prunes and rounds against a loop over single weights, and what it promises."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse import option
from esparse.linalg import damped, inverse_factor
from esparse.patterns import NM, Dense, Pattern, Unstructured, parse
from esparse.quantise.grids import Grid
from esparse.updates import obs
from esparse.updates.column_sweep import rounded as rounded_sweep
from esparse.updates.column_sweep import spans
from esparse.updates.column_sweep import sweep as column_sweep

DAMP = 0.01
sweep = partial(column_sweep, prune=obs.sweep)
rounded = partial(rounded_sweep, prune=obs.sweep)
PATTERNS = [NM(2, 4), NM(4, 8), Unstructured(50), parse("2:4", "2:16"), Dense()]


class Exact(Grid):
    """No grid: every value is its own nearest."""

    code_bits = 32
    zero_code = 0

    def __init__(self, group: int | None = None) -> None:
        self.group, self.outlier_bits = group, None

    def fit(self, values_GC):
        return torch.ones(values_GC.shape[:-1]), None

    def codes(self, weight, scale, zero):
        raise NotImplementedError

    def values(self, codes, scale, zero):
        raise NotImplementedError

    def rounded(self, weight, scale, zero):
        return weight


def grid(name: str, **changes: object) -> Grid:
    return option("quantise", name, **changes)


def problem(outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + 0.5 * torch.eye(inputs)
    x_TI = torch.randn(4 * inputs, inputs, generator=generator) @ mix_II
    return torch.randn(outputs, inputs, generator=generator), x_TI.T @ x_TI


def error(dense_OI: torch.Tensor, weight_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    lost_OI = (dense_OI - weight_OI).double()
    return float((lost_OI @ gram_II.double() * lost_OI).sum())


def by_hand(
    dense_OI: torch.Tensor, gram_II: torch.Tensor, of: Grid, columns: int, keep_OI: torch.Tensor
) -> torch.Tensor:
    """OBS, weight after weight: the inverse of what is left of H is taken anew for every column, in float64."""
    hessian_II = damped(gram_II.double(), DAMP)
    weight_OI = dense_OI.double().clone()

    def moved(weight_I: torch.Tensor, column: int, value: float) -> None:
        """Sets a weight; the others behind it move along the inverse's first column, which costs least."""
        rest_RR = torch.linalg.inv(hessian_II[column:, column:])
        weight_I[column:] -= (float(weight_I[column]) - value) / rest_RR[0, 0] * rest_RR[:, 0]
        weight_I[column] = value

    for row in range(len(weight_OI)):
        for column in range(weight_OI.shape[1]):
            if column % columns == 0:
                ahead_I, group = weight_OI[row].clone(), range(column, column + columns)
                for place in group:
                    if not keep_OI[row, place]:
                        moved(ahead_I, place, 0.0)
                scale, zero = of.fit(ahead_I[column : column + columns].float())
            value = weight_OI[row, column].float()
            moved(weight_OI[row], column, float(of.rounded(value, scale, zero)) if keep_OI[row, column] else 0.0)
    return weight_OI.float()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("mask", ["start", "own"])
@pytest.mark.parametrize("block", [5, 128])
def test_without_a_grid_it_is_obs(pattern: Pattern, mask: str, block: int) -> None:
    dense_OI, gram_II = problem(6, 48, 0)
    upper_II = inverse_factor(gram_II, DAMP)
    fixed_OI = pattern.keep_top(dense_OI.abs()) if mask == "start" else None
    weight_OI, keep_OI, _ = sweep(dense_OI, upper_II, Exact(16), pattern, fixed_OI, block=block)
    expected_OI, keep = obs.sweep(dense_OI, upper_II, pattern, fixed_OI, block=block)
    assert torch.equal(keep_OI, keep)
    torch.testing.assert_close(weight_OI, expected_OI, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "fp8", "nf4"])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("pattern", [Dense(), NM(2, 4)], ids=str)
def test_it_is_gptq_weight_after_weight(name: str, group: int | None, pattern: Pattern) -> None:
    dense_OI, gram_II = problem(4, 24, 1)
    keep_OI = pattern.keep_top(dense_OI.abs())
    of = grid(name, group=group)
    weight_OI, _, scales = sweep(dense_OI, inverse_factor(gram_II, DAMP), of, pattern, keep_OI, block=7)
    expected_OI = by_hand(dense_OI, gram_II, of, group or 24, keep_OI)
    # A value half way between two levels may go either way, and all behind it follow.
    assert (weight_OI - expected_OI).abs().max() < 1e-3 * dense_OI.abs().max()
    assert scales.scale_OG.shape == (4, 24 // (group or 24))


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "fp8", "nf4"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("mask", ["start", "own"])
def test_every_value_lies_on_its_grid_and_zeros_stay_zeros(name: str, pattern: Pattern, mask: str) -> None:
    dense_OI, gram_II = problem(8, 64, 2)
    fixed_OI = pattern.keep_top(dense_OI.abs()) if mask == "start" else None
    of = grid(name, group=16)
    weight_OI, keep_OI, scales = sweep(dense_OI, inverse_factor(gram_II, DAMP), of, pattern, fixed_OI, block=32)
    assert pattern.holds(keep_OI) and (weight_OI[~keep_OI] == 0).all()
    if fixed_OI is not None:
        assert torch.equal(keep_OI, fixed_OI)
    on_grid_OI = keep_OI if scales.whole_OI is None else keep_OI & ~scales.whole_OI
    per_OI = scales.scale_OG.repeat_interleave(16, 1)
    again_OI = of.values(of.codes(weight_OI, per_OI, None), per_OI, None)
    assert torch.equal(again_OI[on_grid_OI], weight_OI[on_grid_OI])
    if scales.whole_OI is not None:
        assert int(scales.whole_OI.sum()) == 8 * 4 * 2
        assert torch.equal(weight_OI[scales.whole_OI], weight_OI[scales.whole_OI].half().float())
        assert NM(2, 4).holds(on_grid_OI)


@given(
    name=st.sampled_from(["int8", "int4", "int3", "fp8", "nf4"]),
    pattern=st.sampled_from(PATTERNS),
    mask=st.sampled_from(["start", "own"]),
    seed=st.integers(0, 999),
)
def test_no_row_is_behind_rounding_after_pruning(name: str, pattern: Pattern, mask: str, seed: int) -> None:
    dense_OI, gram_II = problem(16, 48, seed)
    upper_II, hessian_II = inverse_factor(gram_II, DAMP), damped(gram_II, DAMP)
    of = grid(name, group=16)
    fixed_OI = pattern.keep_top(dense_OI.abs()) if mask == "start" else None
    joint_OI, keep_OI, _ = rounded(dense_OI, dense_OI, upper_II, of, pattern, fixed_OI, block=32)
    pruned_OI, _ = obs.sweep(dense_OI, upper_II, pattern, keep_OI, block=32)
    after_OI, _ = of.nearest(pruned_OI, keep_OI, pattern)
    last_OI, _, _ = rounded(dense_OI, pruned_OI, upper_II, of, pattern, keep_OI, block=32)
    for row in range(16):
        least = error(dense_OI[[row]], after_OI[[row]], hessian_II)
        assert error(dense_OI[[row]], joint_OI[[row]], hessian_II) <= least * (1 + 1e-5)
        assert error(dense_OI[[row]], last_OI[[row]], hessian_II) <= least * (1 + 1e-5)


@pytest.mark.parametrize("name", ["int4", "int3", "nf4"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_of_few_bits_the_joint_sweep_is_ahead(name: str, pattern: Pattern) -> None:
    dense_OI, gram_II = problem(64, 96, 3)
    upper_II = inverse_factor(gram_II, DAMP)
    of = grid(name, group=32)
    joint_OI, keep_OI, _ = sweep(dense_OI, upper_II, of, pattern, None, block=32)
    pruned_OI, _ = obs.sweep(dense_OI, upper_II, pattern, keep_OI, block=32)
    after_OI, _ = of.nearest(pruned_OI, keep_OI, pattern)
    assert error(dense_OI, joint_OI, gram_II) < 0.99 * error(dense_OI, after_OI, gram_II)


@given(data=st.data(), inputs=st.integers(1, 60), block=st.integers(1, 20))
def test_spans(data: st.DataObject, inputs: int, block: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=2))
    cuts = [slice(first, min(first + size, inputs)) for size in sizes for first in range(0, inputs, size)]
    found = spans(cuts, inputs, block)
    assert [column for start, end in found for column in range(start, end)] == list(range(inputs))
    for start, end in found:
        assert 0 < end - start <= block
        assert not [cut for cut in cuts if start < cut.start < end < cut.stop]
