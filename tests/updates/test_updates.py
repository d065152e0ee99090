"""Updates against slow, obvious versions written from the formulas, and the properties that each must have."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import esparse
from esparse import linalg
from esparse.patterns import NM, Grouping, Outliers, Pattern, Unstructured, parse
from esparse.stats import Gram, LayerStats
from esparse.updates import Chain, Layer, NoUpdate, Solution, Update
from esparse.updates.admm import Admm, gradual_keep
from esparse.updates.alps import Alps
from esparse.updates.obs import Obs, _blocks, sweep
from esparse.updates.support import Support
from esparse.updates.swap import Swap

pytestmark = pytest.mark.usefixtures("loops")

CPU = torch.device("cpu")
OBS = Obs(mask="start", damp=0.01, block=128)
SPARSEGPT = Obs(mask="own", damp=0.01, block=128)
SUPPORT = Support(damp=1e-6, iterations=200, tolerance=1e-7)
SWAP = Swap(values="dense", damp=1e-6, steps=500)
BEST_SWAP = Swap(values="best", damp=1e-6, steps=500)
ADMM = Admm(mask="own", damp=0.1, penalty=1.0, iterations=20, prune_iterations=15)
ALPS = Alps(damp=0.01, penalty=0.1, iterations=100, gradient_iterations=10, tolerance=1e-4)
UPDATES = {"obs": OBS, "sparsegpt": SPARSEGPT, "support": SUPPORT, "swap": SWAP, "best swap": BEST_SWAP}
UPDATES |= {"admm": ADMM, "alps": ALPS, "joint": Chain(first=ALPS, second=Chain(first=BEST_SWAP, second=SUPPORT))}


def problem(
    outputs: int = 6, inputs: int = 16, pattern: Pattern | None = None, seed: int = 0, shuffled: bool = False
) -> tuple[Layer, Solution]:
    """A layer whose input channels hang together, pruned by magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    x_TI = torch.randn(200, inputs, generator=generator) @ (mixing + 2 * inputs**0.5 * torch.eye(inputs))
    x_TI *= torch.logspace(-0.5, 0.5, inputs)
    gram = Gram(inputs=inputs, sequences=4, device=CPU)
    gram.add(x_TI, 0)
    dense_OI = torch.randn(outputs, inputs, generator=generator)
    order_I = torch.randperm(inputs, generator=generator) if shuffled else None
    grouping = Grouping(pattern or NM(2, 4), order_I)
    layer = Layer(dense_OI, grouping, LayerStats("layer", {"gram": gram}, 200))
    return layer, Solution.without_update(dense_OI, grouping.keep_top(dense_OI.abs()))


def error(layer: Layer, weight_OI: Tensor) -> float:
    gram_II = layer.stats["gram"].gram_II.double()
    difference_OI = (layer.dense_OI - weight_OI).double()
    return float(torch.einsum("oi,ij,oj->", difference_OI, gram_II, difference_OI))


def best_on_support(layer: Layer, keep_OI: Tensor) -> Tensor:
    """Oracle: each row's normal equations on its own support, in float64."""
    gram_II = layer.stats["gram"].gram_II.double()
    best = torch.zeros_like(layer.dense_OI, dtype=torch.float64)
    for row, keep_I in enumerate(keep_OI):
        kept = keep_I.nonzero().flatten()
        target = (gram_II @ layer.dense_OI[row].double())[kept]
        best[row, kept] = torch.linalg.solve(gram_II[kept][:, kept], target)
    return best


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 5), NM(8, 16), Unstructured(50)], ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_the_pattern_holds_and_pruned_weights_are_zero(name: str, pattern: Pattern, shuffled: bool) -> None:
    layer, start = problem(pattern=pattern, shuffled=shuffled)
    if ("swap" in name or name == "joint") and not isinstance(pattern, NM):
        with pytest.raises(ValueError, match="needs an n:m pattern"):
            UPDATES[name].apply(layer, start)
        return
    done = UPDATES[name].apply(layer, start)
    assert layer.grouping.holds(done.keep_OI)
    border = 1 if (name, pattern) == ("sparsegpt", Unstructured(50)) else 0  # the one on it goes, of one block
    assert int(done.keep_OI.sum()) == int(start.keep_OI.sum()) - border
    assert torch.isfinite(done.weight_OI).all()
    assert (done.weight_OI[~done.keep_OI] == 0).all()


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(50)], ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_weights_that_lie_transposed_as_in_gpt2_stay_and_give_the_same(
    name: str, pattern: Pattern, quantised: bool
) -> None:
    layer, start = problem(pattern=pattern)
    grid = esparse.option("quantise", "int4", group=8)

    def apply(one: Layer) -> Solution:
        update = UPDATES[name]
        return update.apply_rounding(one, start, grid) if quantised else update.apply(one, start)

    if ("swap" in name or name == "joint") and not isinstance(pattern, NM):
        return  # refused: see above
    expected = apply(layer)
    transposed = replace(layer, dense_OI=layer.dense_OI.T.contiguous().T)
    before, mask = transposed.dense_OI.clone(), start.keep_OI.clone()
    done = apply(transposed)
    assert torch.equal(transposed.dense_OI, before)
    assert torch.equal(start.keep_OI, mask)
    assert torch.equal(done.keep_OI, expected.keep_OI)
    torch.testing.assert_close(done.weight_OI, expected.weight_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("name", sorted(UPDATES.keys() - {"sparsegpt"}))  # its greedy mask may end above magnitude's
def test_every_update_lowers_the_layer_error(name: str, seed: int, shuffled: bool) -> None:
    layer, start = problem(seed=seed, shuffled=shuffled)
    done = UPDATES[name].apply(layer, start)
    assert error(layer, done.weight_OI) < error(layer, start.weight_OI)


@pytest.mark.parametrize("name", ["admm", "alps", "joint", "sparsegpt"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8)], ids=str)
def test_joint_updates_beat_least_squares_on_magnitudes_mask(name: str, pattern: NM) -> None:
    """Averaged over problems: a joint method is not bound to be better on each one."""
    ratios = []
    for seed in range(8):
        layer, start = problem(outputs=16, inputs=32, pattern=pattern, seed=seed)
        reference = error(layer, best_on_support(layer, start.keep_OI))
        done = UPDATES[name].apply(layer, start)
        best = best_on_support(layer, done.keep_OI) if name != "joint" else done.weight_OI
        ratios.append(error(layer, best) / reference)
    assert sum(ratios) / len(ratios) < 1


@pytest.mark.parametrize("shift", [0.1, 3.0])
def test_the_shifted_inverse_is_the_inverse_also_where_a_matrix_is_singular(shift: float) -> None:
    layer, _ = problem()
    for gram_II in (linalg.scaled(layer.stats["gram"].gram_II)[0], torch.ones(16, 16), torch.zeros(16, 16)):
        expected = torch.linalg.inv(gram_II.double() + shift * torch.eye(16))
        torch.testing.assert_close(linalg.shifted_inverse(gram_II, shift).double(), expected, rtol=1e-4, atol=1e-5)


def test_alps_follows_its_iterations() -> None:
    """Oracle: the penalty method as plain lines with inverses in float64; then the exact weights on its support."""
    layer, start = problem(outputs=8, inputs=24)
    gram = layer.stats["gram"].gram_II.double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(24)
    norm = gram.diagonal().sqrt()
    gram, dense = gram / norm / norm[:, None], layer.dense_OI.double() * norm
    penalty, split, dual, last = 0.1, dense, torch.zeros_like(dense), layer.grouping.keep_top(dense.abs())
    for step in range(1, 101):
        weight = (dense @ gram - dual + penalty * split) @ torch.linalg.inv(gram + penalty * torch.eye(24))
        keep = layer.grouping.keep_top((weight + dual / penalty).abs())
        split = (weight + dual / penalty) * keep
        dual = dual + penalty * (weight - split)
        if step % 3 == 0:
            change = int((keep != last).sum()) / int(keep.sum())
            last = keep
            if step > 15 and change < 0.05:
                break
            assert change > 0, "the problem is one whose penalty does not have to fall at first"
            penalty *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
    done = ALPS.apply(layer, start)
    assert torch.equal(done.keep_OI, keep)
    assert error(layer, done.weight_OI) == pytest.approx(error(layer, best_on_support(layer, keep).float()), rel=0.02)


def test_support_equals_the_normal_equations() -> None:
    layer, start = problem()
    done = SUPPORT.apply(layer, start)
    torch.testing.assert_close(done.weight_OI.double(), best_on_support(layer, start.keep_OI), rtol=1e-3, atol=1e-3)
    assert torch.equal(done.keep_OI, start.keep_OI)


@given(iterations=st.integers(1, 20), seed=st.integers(0, 50))
def test_more_gradients_never_raise_the_error(iterations: int, seed: int) -> None:
    layer, start = problem(seed=seed)
    gram_II = linalg.damped(layer.stats["gram"].gram_II, 1e-6)
    errors = []
    for count in (iterations, iterations + 1):
        settings = {"iterations": count, "tolerance": 0.0}
        weight = linalg.solve_on_support(gram_II, layer.dense_OI, start.keep_OI, start.weight_OI, **settings)
        errors.append(error(layer, weight))
    assert errors[1] <= errors[0] * (1 + 1e-4)


def test_obs_with_a_full_mask_changes_nothing() -> None:
    layer, _ = problem()
    everything = torch.ones_like(layer.dense_OI, dtype=torch.bool)
    done = OBS.apply(layer, Solution(layer.dense_OI, everything))
    assert torch.equal(done.weight_OI, layer.dense_OI)


def test_obs_on_one_pruned_column_equals_least_squares() -> None:
    """All repair goes to later columns, so pruning the first one leaves the whole row free to answer."""
    layer, _ = problem()
    keep_OI = torch.ones_like(layer.dense_OI, dtype=torch.bool)
    keep_OI[:, 0] = False
    done = Obs(mask="start", damp=1e-6, block=128).apply(layer, Solution.without_update(layer.dense_OI, keep_OI))
    expected = best_on_support(layer, keep_OI)
    torch.testing.assert_close(done.weight_OI.double(), expected, rtol=1e-3, atol=1e-3)


def obs_by_hand(layer: Layer, keep_OI: Tensor, damp: float) -> Tensor:
    """Oracle: after each column, H of the remaining columns is inverted anew (float64, one row at a time)."""
    gram_II = layer.stats["gram"].gram_II.double()
    hessian = gram_II + damp * gram_II.diagonal().mean() * torch.eye(len(gram_II), dtype=torch.float64)
    weight = layer.dense_OI.double().clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(weight.shape[0]):
            if not keep_OI[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
    return weight.masked_fill(~keep_OI, 0.0)


@pytest.mark.parametrize("block", [1, 5, 8, 128])
def test_obs_equals_the_column_by_column_formula(block: int) -> None:
    layer, start = problem()
    done = Obs(mask="start", damp=0.01, block=block).apply(layer, start)
    expected = obs_by_hand(layer, start.keep_OI, 0.01)
    torch.testing.assert_close(done.weight_OI.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", [1, 6, 8, 128])
def test_sparsegpt_chooses_each_group_from_the_weights_repaired_so_far(block: int) -> None:
    layer, start = problem()
    done = Obs(mask="own", damp=0.01, block=block).apply(layer, start)
    gram_II = layer.stats["gram"].gram_II.double()
    hessian = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    weight, keep = layer.dense_OI.double().clone(), torch.ones(6, 16, dtype=torch.bool)
    for column in range(16):
        if column % 4 == 0:
            for row in range(6):
                scores = [
                    (weight[row, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0]).item()
                    for j in range(column, column + 4)
                ]
                for slot in sorted(range(4), key=lambda k, s=scores: s[k])[:2]:
                    keep[row, column + slot] = False
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(6):
            if not keep[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
    assert torch.equal(done.keep_OI, keep)
    torch.testing.assert_close(done.weight_OI.double(), weight.masked_fill(~keep, 0.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("outputs", [5, 40])
@pytest.mark.parametrize(("percent", "block"), [(50, 128), (50, 16), (70, 48), (62.5, 7)])
def test_sparsegpt_removes_a_share_of_each_block_of_columns_over_all_rows(
    outputs: int, percent: float, block: int
) -> None:
    """Oracle: the authors' algorithm as plain loops, with the inverse's factor by an inversion in float64."""
    pattern = Unstructured(percent)
    layer, _ = problem(outputs=outputs, inputs=130, pattern=pattern)
    done = Obs(mask="own", damp=0.01, block=block).apply(layer, Solution(layer.dense_OI, layer.dense_OI != 0))
    gram = layer.stats["gram"].gram_II.double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(130)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    weight, keep = layer.dense_OI.double().clone(), torch.ones(outputs, 130, dtype=torch.bool)
    for first in range(0, 130, block):
        columns = range(first, min(first + block, 130))
        scores = sorted(
            float(weight[row, column] ** 2 / upper[column, column] ** 2) for row in range(outputs) for column in columns
        )
        border = scores[int(len(scores) * percent / 100)]
        for column in columns:
            for row in range(outputs):
                # Both come from the weights at the block's beginning: kept apart until the block is done.
                keep[row, column] = float(weight[row, column] ** 2 / upper[column, column] ** 2) > border
        for column in columns:
            for row in range(outputs):
                if not keep[row, column]:
                    weight[row, column:] -= weight[row, column] / upper[column, column] * upper[column, column:]
    assert torch.equal(done.keep_OI, keep)
    torch.testing.assert_close(done.weight_OI.double(), weight.masked_fill(~keep, 0.0), rtol=1e-3, atol=1e-3)
    rows = done.keep_OI.sum(1)
    assert len(rows.unique()) > 1  # no row has a share of its own


@pytest.mark.parametrize(
    ("mask", "pattern"),
    [(mask, p) for mask in ("start", "own") for p in (NM(2, 4), NM(3, 7), NM(10, 20), NM(30, 60))]
    + [("start", Unstructured(50))],  # of a share in per cent, `own` chooses by blocks
    ids=str,
)
def test_blocks_within_blocks_change_nothing(mask: str, pattern: Pattern) -> None:
    """Groups shorter and longer than the inner blocks and than the outer ones; a block of 1 repairs all at once."""
    layer, start = problem(inputs=130, pattern=pattern)
    plain = Obs(mask=mask, damp=0.01, block=1).apply(layer, start)
    for block in (16, 40, 128):
        done = Obs(mask=mask, damp=0.01, block=block).apply(layer, start)
        assert torch.equal(done.keep_OI, plain.keep_OI)
        torch.testing.assert_close(done.weight_OI, plain.weight_OI, rtol=1e-3, atol=1e-3)


@given(m=st.integers(1, 9), inputs=st.integers(1, 60), block=st.integers(1, 20))
def test_no_group_crosses_a_block_that_it_does_not_begin(m: int, inputs: int, block: int) -> None:
    cuts = NM(1, m).cuts(inputs)
    blocks = _blocks(cuts, block)
    assert [start for start, _ in blocks] == [0, *[end for _, end in blocks[:-1]]]
    assert blocks[-1][1] == inputs
    assert all(end - start <= block for start, end in blocks)
    for start, end in blocks:
        for cut in cuts:
            assert not (start < cut.start < end < cut.stop)


def test_the_inverse_factor_is_the_inverses_upper_factor() -> None:
    gram_II = problem()[0].stats["gram"].gram_II
    upper_II = linalg.inverse_factor(gram_II, 0.01).double()
    assert torch.equal(upper_II, upper_II.triu())
    expected = torch.linalg.inv(linalg.damped(gram_II.double(), 0.01))
    torch.testing.assert_close(upper_II.T @ upper_II, expected, rtol=1e-4, atol=1e-8)


def test_dead_channels_and_singular_matrices_do_no_harm() -> None:
    layer, start = problem()
    gram = layer.stats["gram"]
    gram.gram_II[3], gram.gram_II[:, 3] = 0.0, 0.0
    for name, update in UPDATES.items():
        done = update.apply(layer, start)
        assert torch.isfinite(done.weight_OI).all(), name
    zero = Gram(inputs=16, sequences=1, device=CPU)
    nothing = Layer(layer.dense_OI, layer.grouping, LayerStats("layer", {"gram": zero}, 200))
    for name, update in UPDATES.items():
        assert torch.isfinite(update.apply(nothing, start).weight_OI).all(), name


def test_damping_grows_until_a_factor_exists() -> None:
    gram_II = torch.ones(8, 8)  # of rank 1, and not even semi-definite after rounding
    gram_II -= 1e-3 * torch.eye(8)
    upper_II = linalg.inverse_factor(gram_II, 1e-6)
    assert torch.isfinite(upper_II).all()


def test_values_are_finite_even_where_their_sum_is_not() -> None:
    assert linalg.all_finite(torch.full((4,), 3e38))
    assert linalg.all_finite(torch.full((4,), 6e4, dtype=torch.float16))
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not linalg.all_finite(torch.tensor([1.0, value]))
    assert not linalg.all_finite(torch.tensor([torch.inf, -torch.inf]))


def test_a_gram_matrix_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        linalg.inverse_factor(torch.full((4, 4), float("nan")), 0.01)


def swap_errors(layer: Layer, solution: Solution, m: int) -> list[float]:
    """Oracle: the error after every single exchange within a group, weights that come back having their own value."""
    errors = []
    outputs, inputs = layer.dense_OI.shape
    ordered = list(range(inputs)) if layer.grouping.order_I is None else layer.grouping.order_I.tolist()
    for row, start in itertools.product(range(outputs), range(0, inputs, m)):
        group = ordered[start : start + m]
        for p, q in itertools.product(group, group):
            if solution.keep_OI[row, p] and not solution.keep_OI[row, q]:
                weight = solution.weight_OI.clone()
                weight[row, p], weight[row, q] = 0.0, layer.dense_OI[row, q]
                errors.append(error(layer, weight))
    return errors


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)], ids=str)
def test_one_swap_is_the_best_one_and_in_the_end_none_is_left(pattern: NM, shuffled: bool) -> None:
    layer, start = problem(outputs=1, pattern=pattern, shuffled=shuffled)
    once = Swap(values="dense", damp=0.0, steps=1).apply(layer, start)
    best = min([*swap_errors(layer, start, pattern.m), error(layer, start.weight_OI)])
    assert error(layer, once.weight_OI) == pytest.approx(best, rel=1e-4)
    done = Swap(values="dense", damp=0.0, steps=500).apply(layer, start)
    assert min(swap_errors(layer, done, pattern.m)) >= error(layer, done.weight_OI) * (1 - 1e-4)
    assert torch.equal(done.weight_OI, layer.dense_OI.masked_fill(~done.keep_OI, 0.0))


@pytest.mark.parametrize("name", ["swap", "best swap"])
def test_a_layer_narrower_than_a_group_keeps_its_mask(name: str) -> None:
    layer, start = problem(inputs=12, pattern=NM(1, 16))
    assert torch.equal(UPDATES[name].apply(layer, start).keep_OI, start.keep_OI)


def test_the_best_value_of_a_swap_is_the_least_error() -> None:
    layer, start = problem(outputs=1)
    done = Swap(values="best", damp=0.0, steps=1).apply(layer, start)
    (came,) = (done.keep_OI & ~start.keep_OI).nonzero().tolist()
    usual = error(layer, done.weight_OI)
    for shift in (-1e-2, 1e-2):
        other = done.weight_OI.clone()
        other[tuple(came)] += shift
        assert error(layer, other) > usual


def test_gradual_keep_lets_the_lowest_go_first() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0, 8.0, 7.0, 6.0, 5.0]])
    grouping = Grouping(NM(2, 4))
    assert gradual_keep(scores, grouping, 0.5).int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 1]]
    assert gradual_keep(scores, grouping, 1.0).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    assert gradual_keep(scores, grouping, 0.0).all()


def test_admm_by_hand() -> None:
    """The published order of steps on one row, in float64, written out."""
    layer, start = problem(outputs=1)
    done = ADMM.apply(layer, start)
    gram = layer.stats["gram"].gram_II.double()
    norm = gram.diagonal().sqrt() + 1e-8
    gram = gram / (norm[:, None] * norm) + 0.1 * torch.eye(16, dtype=torch.float64)
    inverse = torch.linalg.inv(gram + torch.eye(16, dtype=torch.float64))
    dense = layer.dense_OI[0].double() * norm
    weight, dual = dense.clone(), torch.zeros(16, dtype=torch.float64)
    for step in range(20):
        if step < 15:
            share = 1 - (1 - (step + 1) / 15) ** 3
            keep = gradual_keep((weight + dual).abs()[None], layer.grouping, share)[0]
        split = (weight + dual) * keep
        dual = dual + weight - split
        weight = inverse @ (gram @ dense + split - dual)
    expected = (weight + dual) * keep / norm
    torch.testing.assert_close(done.weight_OI[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_updates_in_a_row_are_applied_in_that_order() -> None:
    layer, start = problem()
    row: Update = Chain(first=SWAP, second=SUPPORT)
    expected = SUPPORT.apply(layer, SWAP.apply(layer, start))
    assert torch.equal(row.apply(layer, start).weight_OI, expected.weight_OI)
    assert set(row.collects()) == {"gram"}
    assert NoUpdate().apply(layer, start) is start


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(8, 16), Outliers(NM(8, 16), NM(4, 32))], ids=str)
@pytest.mark.parametrize("update", [OBS, SPARSEGPT, Chain(first=SPARSEGPT, second=OBS)], ids=["obs", "own", "both"])
def test_rows_of_several_layers_may_be_swept_as_one(update: Update, pattern: Pattern, shuffled: bool) -> None:
    layer, start = problem(outputs=9, inputs=64, pattern=pattern, shuffled=shuffled)
    assert update.by_rows(pattern)
    whole = update.apply(layer, start)
    for rows in (slice(0, 2), slice(2, 9)):
        part = Layer(layer.dense_OI[rows], layer.grouping, layer.stats)
        done = update.apply(part, Solution(start.weight_OI[rows], start.keep_OI[rows]))
        assert torch.equal(done.keep_OI, whole.keep_OI[rows])
        torch.testing.assert_close(done.weight_OI, whole.weight_OI[rows])


def test_whole_columns_are_chosen_by_all_rows_of_one_layer() -> None:
    columns = parse("50%@columns")
    assert OBS.by_rows(columns)
    assert not SPARSEGPT.by_rows(columns)
    assert not Chain(first=OBS, second=SPARSEGPT).by_rows(columns)
    assert not NoUpdate().by_rows(NM(2, 4))  # there is nothing to gain


def test_of_equal_chances_the_lowest_index_survives() -> None:
    """Orthogonal channels of one size, so that nothing is repaired; of the last group of 2 one survives."""
    weight_OI = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 2.0, 2.0], [-1.0] * 10])
    _, keep_OI = sweep(weight_OI, torch.eye(10), NM(2, 4), None, block=8)
    assert keep_OI.int().tolist() == [[1, 1, 0, 0, 1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1, 0, 0, 1, 0]]


@pytest.mark.parametrize("mask", ["start", "own"])
def test_many_rows_are_swept_like_one(mask: str) -> None:
    layer, start = problem(outputs=260)
    many = Obs(mask=mask, damp=0.01, block=8).apply(layer, start)
    for row in (0, 130, 255, 256, 259):
        one = Layer(layer.dense_OI[row, None], layer.grouping, layer.stats)
        alone = Obs(mask=mask, damp=0.01, block=8).apply(
            one, Solution(start.weight_OI[row, None], start.keep_OI[row, None])
        )
        assert torch.equal(many.keep_OI[row], alone.keep_OI[0])
        torch.testing.assert_close(many.weight_OI[row], alone.weight_OI[0], rtol=1e-4, atol=1e-5)


def test_a_sweep_leaves_its_input_alone() -> None:
    layer, start = problem()
    before = layer.dense_OI.clone(), start.keep_OI.clone()
    sweep(layer.dense_OI, linalg.inverse_factor(layer.stats["gram"].gram_II, 0.01), NM(2, 4), start.keep_OI, block=4)
    sweep(layer.dense_OI, linalg.inverse_factor(layer.stats["gram"].gram_II, 0.01), NM(2, 4), None, block=4)
    assert torch.equal(before[0], layer.dense_OI)
    assert torch.equal(before[1], start.keep_OI)
