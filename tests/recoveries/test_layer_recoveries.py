"""Recoveries of single layers against plain loops written from the formulas, and through the block loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esparse.metrics.magnitude import Magnitude
from esparse.metrics.wanda import Wanda
from esparse.models.blocks import BlockModel
from esparse.patterns import NM, Columns, Grouping, Outliers, Pattern, Rows, Tiles, Unstructured
from esparse.pruning.prune import Method, Pruned, prune
from esparse.records.report import Stages
from esparse.recoveries import Chain, NoRecovery, Recovery
from esparse.recoveries.bias import Bias
from esparse.recoveries.dsnot import Dsnot, exchange
from esparse.recoveries.variance import Variance
from esparse.shuffles import NoShuffle
from esparse.stats import ColumnMoments, ColumnNorm, LayerStats
from esparse.updates import Layer, Solution
from tests.models.families import tiny

CPU = torch.device("cpu")
TOKENS_SL = torch.randint(1, 96, (6, 20), generator=torch.Generator().manual_seed(5))
ROW, WHOLE, BIAS = Variance(granularity="row"), Variance(granularity="layer"), Bias()
DSNOT = Dsnot(cycles=50, threshold=0.1, power=1.0, skip=[])
SWAPPED = [NM(2, 4), NM(1, 4), NM(3, 5), NM(8, 16), Unstructured(50), Unstructured(80), Outliers(NM(2, 4), NM(2, 8))]


def problem(
    pattern: Pattern | None = None, *, seed: int = 0, outputs: int = 5, inputs: int = 16, shuffled: bool = False
) -> tuple[Layer, Solution, Tensor]:
    """A layer pruned by magnitude, and the inputs (4 sequences of 10 tokens, means far from 0) that it saw."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(40, inputs, generator=generator) * torch.logspace(-1, 0.5, inputs)
    x_TI += torch.randn(inputs, generator=generator)
    x_TI[:, 1] = 0.75  # a channel that never changes
    x_TI[:, 2] = 0.0
    stats = {"moments": ColumnMoments, "norm": ColumnNorm}
    built = {name: build(inputs=inputs, sequences=4, device=CPU) for name, build in stats.items()}
    for statistic in built.values():
        statistic.add(x_TI, 0)
    dense_OI = torch.randn(outputs, inputs, generator=generator)
    grouping = Grouping(pattern or NM(2, 4), torch.randperm(inputs, generator=generator) if shuffled else None)
    layer = Layer(dense_OI, grouping, LayerStats("model.mlp.up", built, 40))
    return layer, Solution.without_update(dense_OI, grouping.keep_top(dense_OI.abs())), x_TI


# Variance


def variance_by_hand(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


@pytest.mark.parametrize("recovery", [ROW, WHOLE], ids=["row", "layer"])
def test_variance_is_restored_and_survivors_are_scaled_by_one_factor(recovery: Variance) -> None:
    layer, pruned, _ = problem(outputs=7)
    done = recovery.layer(layer, pruned)
    parts = (layer.dense_OI, pruned.weight_OI, done.weight_OI)
    rows = [part.tolist() for part in parts] if recovery is ROW else [[part.flatten().tolist()] for part in parts]
    factors = []
    for dense, before, after in zip(*rows, strict=True):
        assert variance_by_hand(after) == pytest.approx(variance_by_hand(dense), rel=1e-6)
        factors.append(math.sqrt(variance_by_hand(dense) / variance_by_hand(before)))
        assert after == pytest.approx([factors[-1] * value for value in before], rel=1e-6)
    assert all(factor > 1 for factor in factors)
    assert torch.equal(done.keep_OI, pruned.keep_OI)
    assert not torch.signbit(done.weight_OI[~done.keep_OI]).any()


def test_variance_by_hand() -> None:
    # Var(3, -1, 1, 1) = 2; pruned to (3, -1, 0, 0) it is 10/4 - 1/4 = 9/4: the factor is sqrt(8/9).
    layer = Layer(torch.tensor([[3.0, -1.0, 1.0, 1.0]]), Grouping(NM(2, 4)), LayerStats("layer", {}, 1))
    keep_OI = torch.tensor([[True, True, False, False]])
    done = ROW.layer(layer, Solution.without_update(layer.dense_OI, keep_OI))
    torch.testing.assert_close(done.weight_OI, torch.tensor([[3.0, -1.0, 0.0, 0.0]]) * math.sqrt(8 / 9))


def test_rows_without_survivors_or_variance_stay() -> None:
    dense_OI = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 2.0, 0.5]])
    keep_OI = torch.tensor([[False] * 4, [True, True, False, False], [True] * 4, [True] * 4])
    pruned = Solution.without_update(dense_OI, keep_OI)
    layer = Layer(dense_OI, Grouping(NM(2, 4)), LayerStats("layer", {}, 1))
    assert torch.equal(ROW.layer(layer, pruned).weight_OI, pruned.weight_OI)
    nothing = Solution.without_update(dense_OI, torch.zeros_like(keep_OI))
    assert torch.equal(WHOLE.layer(layer, nothing).weight_OI, nothing.weight_OI)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recovery\.granularity must be one of row, layer, got 'head'"):
        Variance(granularity="head")


# Bias


def test_the_shift_is_what_the_weights_no_longer_give_on_average() -> None:
    layer, pruned, x_TI = problem()
    done = BIAS.layer(layer, pruned)
    for row, (dense, left) in enumerate(zip(layer.dense_OI.tolist(), pruned.weight_OI.tolist(), strict=True)):
        lost = [sum((w - v) * x for w, v, x in zip(dense, left, token, strict=True)) for token in x_TI.tolist()]
        assert done.bias_shift_O[row].item() == pytest.approx(sum(lost) / len(lost), abs=1e-5)
    assert torch.equal(done.weight_OI, pruned.weight_OI)
    assert torch.equal(done.keep_OI, pruned.keep_OI)


def test_a_second_correction_of_the_bias_changes_nothing() -> None:
    layer, pruned, x_TI = problem()
    once = BIAS.layer(layer, pruned)
    torch.testing.assert_close(Chain(first=BIAS, second=BIAS).layer(layer, pruned).bias_shift_O, once.bias_shift_O)
    shifted = replace(pruned, bias_shift_O=torch.ones(5))
    torch.testing.assert_close(BIAS.layer(layer, shifted).bias_shift_O, once.bias_shift_O)
    both = Chain(first=ROW, second=BIAS).layer(layer, pruned)
    mean_TO = x_TI @ both.weight_OI.T + both.bias_shift_O - x_TI @ layer.dense_OI.T
    torch.testing.assert_close(mean_TO.mean(0), torch.zeros(5), rtol=0, atol=1e-5)


# DSnoT


def errors(layer: Layer, keep_OI: Tensor, x_TI: Tensor) -> Tensor:
    """Of each row: how much lower the mean over 4 sequences of the output's sum is without the pruned weights."""
    return (x_TI.double() @ layer.dense_OI.masked_fill(keep_OI, 0.0).double().T).sum(0) / 4


def dsnot_by_hand(layer: Layer, keep_OI: Tensor, x_TI: Tensor, recovery: Dsnot) -> tuple[list[list[bool]], int]:
    """The mask after the rule, step by step, and how many steps there were in all."""
    _outputs, inputs = keep_OI.shape
    order = list(range(inputs)) if layer.grouping.order_I is None else layer.grouping.order_I.tolist()
    pattern = layer.grouping.pattern
    width = {NM: lambda p: p.m, Outliers: lambda p: p.base.m, Unstructured: lambda p: inputs}[type(pattern)](pattern)
    groups = [order[start : start + width] for start in range(0, inputs, width)]
    columns = x_TI.double().T.tolist()
    total = [sum(column) / 4 for column in columns]
    norm = [math.sqrt(sum(x * x for x in column)) for column in columns]
    variance = [max(variance_by_hand(column), 1e-30) for column in columns]
    keep, steps = keep_OI.tolist(), 0
    for row, weights in enumerate(layer.dense_OI.tolist()):
        error = sum(weights[j] * total[j] for j in range(inputs) if not keep[row][j])
        for _ in range(recovery.cycles):
            if abs(error) < recovery.threshold:
                break
            sign = 1 if error > 0 else -1
            best, pair = -math.inf, None
            for group in groups:
                going = [j for j in group if keep[row][j] and sign * weights[j] * total[j] < 0]
                for j in group:
                    if going and not keep[row][j] and sign * weights[j] * total[j] > 0:
                        rank = sign * weights[j] * total[j] / variance[j] ** recovery.power
                        if rank > best:
                            best, pair = rank, (j, min(going, key=lambda k: abs(weights[k]) * norm[k]))
            if pair is None:
                break
            after = error - weights[pair[0]] * total[pair[0]] + weights[pair[1]] * total[pair[1]]
            if abs(after) >= abs(error):
                break
            error = after
            keep[row][pair[0]], keep[row][pair[1]] = True, False
            steps += 1
    return keep, steps


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("pattern", SWAPPED, ids=str)
def test_dsnot_equals_the_rule_step_by_step(pattern: Pattern, shuffled: bool) -> None:
    steps = 0
    for seed in range(6):
        # 22 channels end in a group of 2 where m is 4 or 5, and of 6 where it is 16.
        layer, pruned, x_TI = problem(pattern, seed=seed, inputs=22, shuffled=shuffled)
        recovery = replace(DSNOT, cycles=(50, 2)[seed % 2], power=(1.0, 0.5, 0.0)[seed % 3], threshold=0.3 * (seed % 2))
        expected, taken = dsnot_by_hand(layer, pruned.keep_OI, x_TI, recovery)
        done = recovery.layer(layer, pruned)
        assert done.keep_OI.tolist() == expected
        steps += taken
    assert steps >= 5  # else nothing was compared


def test_dsnot_by_hand() -> None:
    # One row, sums s = 1 and variances 1: pruned 0.5 and 0.2 leave e = 0.7 (too low). The larger, 0.5, comes back; of
    # the kept ones only -0.6 helps by going: e = 0.7 - 0.5 - 0.6 = -0.4, which is better. Now e < 0: of the pruned ones
    # only -0.6 would lift it, for 0.5 or 3; 0.5 has the lower score: e = -0.4 + 0.6 + 0.5 = 0.7, which is not better.
    weights = torch.tensor([[3.0, -0.6, 0.5, 0.2]])
    keep = torch.tensor([[True, True, False, False]])
    got = exchange(keep, weights.double(), weights.double(), weights.abs(), m=4, cycles=50, threshold=0.1)
    assert got.tolist() == [[True, False, True, False]]
    assert keep.tolist() == [[True, True, False, False]]  # what was given stays
    got = exchange(keep, weights.double(), weights.double(), weights.abs(), m=4, cycles=50, threshold=0.8)
    assert got.tolist() == keep.tolist()


def test_a_row_whose_groups_have_no_pair_stays() -> None:
    # e = 1.3: in the first group -0.3 could go but nothing come back, in the second 1.0 come back but nothing go.
    weights = torch.tensor([[0.4, -0.3, -0.1, -0.1, 2.0, 1.0, 1.0, 0.5]])
    keep = torch.tensor([[True, True, False, False] * 2])
    got = exchange(keep, weights.double(), weights.double(), weights.abs(), m=4, cycles=50, threshold=0.1)
    assert torch.equal(got, keep)


@given(pattern=st.sampled_from(SWAPPED), seed=st.integers(0, 999), inputs=st.integers(3, 40), cycles=st.integers(1, 6))
def test_dsnot_keeps_the_pattern_and_never_raises_an_error(
    pattern: Pattern, seed: int, inputs: int, cycles: int
) -> None:
    layer, pruned, x_TI = problem(pattern, seed=seed, inputs=inputs, shuffled=True)
    before = errors(layer, pruned.keep_OI, x_TI).abs()
    for count in (cycles, cycles + 1):
        done = replace(DSNOT, cycles=count).layer(layer, pruned)
        assert layer.grouping.holds(done.keep_OI)
        assert torch.equal(done.keep_OI.sum(1), pruned.keep_OI.sum(1))
        assert torch.equal(done.weight_OI, layer.dense_OI.masked_fill(~done.keep_OI, 0.0))
        after = errors(layer, done.keep_OI, x_TI).abs()
        assert (after <= before * (1 + 1e-6) + 1e-9).all()
        unchanged = (done.keep_OI == pruned.keep_OI).all(1)
        assert unchanged[errors(layer, pruned.keep_OI, x_TI).abs() < 0.0999].all()
        before = after


def test_dsnot_brings_errors_down() -> None:
    layer, pruned, x_TI = problem(outputs=64, inputs=64)
    before, after = (errors(layer, of.keep_OI, x_TI).abs() for of in (pruned, DSNOT.layer(layer, pruned)))
    assert after.mean() < 0.25 * before.mean()


def test_dsnot_leaves_rows_below_the_threshold_alone() -> None:
    layer, pruned, x_TI = problem(outputs=8)
    sizes = errors(layer, pruned.keep_OI, x_TI).abs()
    assert torch.equal(replace(DSNOT, threshold=float(sizes.max()) * 1.01).layer(layer, pruned).keep_OI, pruned.keep_OI)
    middle = float(sizes.median())
    changed = (replace(DSNOT, threshold=middle * 1.001).layer(layer, pruned).keep_OI != pruned.keep_OI).any(1)
    assert changed.any()
    assert not changed[sizes <= middle].any()


def test_dsnot_takes_the_mask_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, pruned, _ = problem()
    updated = replace(pruned, weight_OI=2 * pruned.weight_OI, bias_shift_O=torch.ones(5))
    expected, got = DSNOT.layer(layer, pruned), DSNOT.layer(layer, updated)
    assert torch.equal(got.weight_OI, expected.weight_OI)
    assert got.bias_shift_O is None
    monkeypatch.setattr("esparse.recoveries.dsnot.VALUES_AT_ONCE", 32)  # two rows at once
    assert torch.equal(DSNOT.layer(layer, pruned).keep_OI, expected.keep_OI)


def test_dsnot_skips_layers_by_name() -> None:
    layer, pruned, _ = problem()
    assert not torch.equal(replace(DSNOT, skip=["attn"]).layer(layer, pruned).keep_OI, pruned.keep_OI)
    assert replace(DSNOT, skip=["attn", "mlp"]).layer(layer, pruned) is pruned
    for whole in ("mlp$", r"up\.weight$"):  # a module that it lies in, its weight
        assert replace(DSNOT, skip=[whole]).layer(layer, pruned) is pruned


@pytest.mark.parametrize("pattern", [Columns(50), Rows(50), Tiles(50, 4, 4)], ids=str)
def test_dsnot_refuses_patterns_without_exchanges(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match=f"recovery=dsnot exchanges weights .* not {pattern}"):
        DSNOT.check(pattern)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("cycles", 0, "recovery.cycles must be positive, got 0"),
        ("threshold", -0.1, "recovery.threshold must be at least 0 and finite, got -0.1"),
        ("power", math.inf, "recovery.power must be at least 0 and finite, got inf"),
        ("skip", ["(mlp"], r"recovery.skip holds '\(mlp', which is no regular expression"),
    ],
)
def test_dsnots_settings_are_checked(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DSNOT, **{setting: value})


# Through the block loop


def run(family: str, recovery: Recovery, metric: type = Wanda) -> tuple[nn.Module, nn.Module, Pruned]:
    """The dense model, the pruned one, and what pruning left."""
    model = tiny(family)
    blocks = BlockModel(model, device=CPU, batch_tokens=40)
    method = Method(metric=metric(), pattern=NM(2, 4), shuffle=NoShuffle(), recovery=recovery)
    return tiny(family), model, prune(blocks, TOKENS_SL, method, stages=Stages())


@pytest.mark.parametrize(
    ("family", "recovery"), [("llama", ROW), ("gpt2", ROW), ("gpt2", WHOLE), ("mixtral", ROW)], ids=str
)
def test_stored_weights_have_their_variance_back(family: str, recovery: Variance) -> None:
    dense, model, pruned = run(family, recovery)
    assert pruned.pattern_holds
    before, after = dense.state_dict(), model.state_dict()
    for name, keep in pruned.keeps.items():
        transposed = before[name].shape != keep.shape or family == "gpt2"
        was, now = (w[name].mT if transposed else w[name] for w in (before, after))
        assert torch.equal(now != 0, keep)
        dims = (-1,) if recovery is ROW else (-2, -1)
        torch.testing.assert_close(now.var(dims), was.var(dims), rtol=1e-5, atol=0)


def mean_change(family: str, recovery: Recovery) -> Tensor:
    """By how much the mean outputs of the first block's layers differ on the inputs that the dense ones get there.

    These are what the layers are calibrated on: all of a block are observed before any of them is pruned.
    """
    dense, model, pruned = run(family, recovery)
    first = [name.removesuffix(".weight") for name in pruned.keeps if "layers.0." in name or ".h.0." in name]
    assert len(first) >= 4
    inputs: dict[str, Tensor] = {}
    for name in first:
        layer = dense.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args[0]))
    with torch.no_grad():
        dense(TOKENS_SL, use_cache=False)
        changes = [dense.get_submodule(name)(x) - model.get_submodule(name)(x) for name, x in inputs.items()]
    return torch.cat([change.flatten(0, -2).mean(0) for change in changes])


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without biases, and with biases and transposed weights
def test_the_mean_output_of_the_first_blocks_layers_is_restored(family: str) -> None:
    without = mean_change(family, NoRecovery())
    assert without.abs().mean() > 1e-3
    for recovery in (BIAS, Chain(first=ROW, second=BIAS)):
        torch.testing.assert_close(mean_change(family, recovery), torch.zeros_like(without), rtol=0, atol=2e-6)
    assert mean_change(family, DSNOT).abs().mean() < 0.7 * without.abs().mean()


def test_biases_are_made_where_there_were_none_and_experts_go_without() -> None:
    dense, model, pruned = run("mixtral", BIAS)
    new = set(model.state_dict()) - set(dense.state_dict())
    assert new == {f"{name.removesuffix('.weight')}.bias" for name in pruned.keeps if "experts" not in name}
    assert new


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dsnots_mask_is_the_one_that_is_stored(family: str) -> None:
    dense, model, pruned = run(family, DSNOT, Magnitude)
    _, _, plain = run(family, NoRecovery(), Magnitude)
    assert pruned.pattern_holds
    assert any(not torch.equal(pruned.keeps[name], plain.keeps[name]) for name in plain.keeps)
    before, after = dense.state_dict(), model.state_dict()
    for name, weight in after.items():
        if name in pruned.keeps:
            kept = weight != 0
            assert torch.equal(weight[kept], before[name][kept])
            assert int(kept.sum()) * 2 == kept.numel()
