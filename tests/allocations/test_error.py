"""The allocation by measured errors: the errors against loops, the plan against all assignments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.allocations import Measured
from esparse.allocations.budget import Shape
from esparse.allocations.error import Errors, LayerError, between
from esparse.metrics.wanda import Wanda
from esparse.patterns import NM, Outliers, Pattern, Unstructured, parse
from esparse.shuffles.gns import Gns
from tests.allocations.layers import layer, linears, pruned, uneven

ERROR = LayerError(spread=0.25, weigh="layers", points=5.0)


def errors_by_loops(
    weight_OI: torch.Tensor, x_TI: torch.Tensor, score_OI: torch.Tensor, patterns: list[Pattern]
) -> list[float]:
    """||X (W - W')^T||^2 / ||X W^T||^2 for the mask of each pattern."""
    found = []
    for pattern in patterns:
        keep_OI = pattern.keep_top(score_OI)
        lost = whole = 0.0
        for x in x_TI.tolist():
            for row, kept in zip(weight_OI.tolist(), keep_OI.tolist(), strict=True):
                whole += sum(a * w for a, w in zip(x, row, strict=True)) ** 2
                lost += sum(a * w for a, w, k in zip(x, row, kept, strict=True) if not k) ** 2
        found.append(lost / whole)
    return found


@pytest.mark.parametrize(
    ("asked", "tried"),
    [
        (NM(2, 4), [NM(1, 4), NM(2, 4), NM(3, 4)]),
        (NM(4, 8), [NM(n, 8) for n in range(2, 7)]),
        (Outliers(NM(2, 4), NM(1, 8)), [Outliers(NM(n, 4), NM(1, 8)) for n in (1, 2, 3)]),
        (Unstructured(60.0), [Unstructured(p) for p in (85, 80, 75, 70, 65, 60.0, 55, 50, 45, 40, 35)]),
    ],
    ids=str,
)
def test_measured_errors(asked: Pattern, tried: list[Pattern]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(5, 16, generator=generator)
    x_TI = torch.randn(12, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    score_OI = torch.rand(5, 16, generator=generator)  # not Wanda's: the metric's own scores choose the mask
    got = ERROR.measure(layer(weight_OI, x_TI, asked, name="a.b"), score_OI)
    assert got is not None
    assert got.shape == Shape("a.b", 5, 16)
    assert got.errors == pytest.approx(errors_by_loops(weight_OI, x_TI, score_OI, tried), rel=1e-4)


def test_a_layer_whose_output_is_zero_has_no_error() -> None:
    got = ERROR.measure(layer(torch.zeros(3, 8), torch.ones(4, 8), NM(2, 4)), torch.ones(3, 8))
    assert got is not None
    assert got.errors == [0.0, 0.0, 0.0]
    assert ERROR.measure(layer(torch.ones(3, 8), torch.ones(0, 8), NM(2, 4)), torch.ones(3, 8)) is None


@st.composite
def groups(draw: st.DrawFn) -> list[list[list[float]]]:
    """Up to three groups of one or two layers, each with convexly falling errors at 1:4, 2:4 and 3:4."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        layers = []
        for _ in range(draw(st.integers(1, 2))):
            steps = sorted(draw(st.lists(st.integers(1, 99), min_size=3, max_size=3)), reverse=True)
            layers.append([sum(steps[place:]) / 300 for place in range(3)])
        found.append(layers)
    return found


@given(problem=groups(), weigh=st.sampled_from(["weights", "layers"]), widths=st.lists(st.integers(1, 3), min_size=4))
def test_the_plan_has_the_least_error_of_all(problem: list, weigh: str, widths: list[int]) -> None:
    measured, sizes = [], {}
    for group, layers in enumerate(problem):
        for part, errors in enumerate(layers):
            name = f"{group}.{part}"
            sizes[name] = (1 + part, 8 * widths[group])
            value = Errors(Shape(name, *sizes[name]), errors)
            measured.append(Measured(name, 0, group, math.prod(sizes[name]), value))
    plan = LayerError(spread=0.25, weigh=weigh, points=5.0).plan(measured, NM(2, 4))

    def error(n_of_group: list[int]) -> float:
        found = 0.0
        for one in measured:
            weight = one.weights if weigh == "weights" else 1
            found += weight * one.value.errors[n_of_group[one.group] - 1]
        return found

    def kept(n_of_group: list[int]) -> int:
        return sum(one.weights * n_of_group[one.group] // 4 for one in measured)

    def chosen(group: int) -> int:
        got = {plan.get(one.name, NM(2, 4)) for one in measured if one.group == group}
        assert len(got) == 1
        pattern = got.pop()
        assert isinstance(pattern, NM)
        return pattern.n

    every = [list(n) for n in itertools.product((1, 2, 3), repeat=len(problem))]
    allowed = [n for n in every if kept(n) <= kept([2] * len(problem))]
    got = [chosen(group) for group in range(len(problem))]
    assert got in allowed
    assert error(got) == pytest.approx(min(error(n) for n in allowed), rel=1e-12)


def test_a_large_layer_outweighs_a_small_one_unless_layers_count_once() -> None:
    small, large = Shape("small", 1, 16), Shape("large", 2, 16)
    measured = [
        Measured("small", 0, 0, 16, Errors(small, [0.5, 0.3, 0.2, 0.1, 0.0])),
        Measured("large", 0, 1, 32, Errors(large, [0.45, 0.32, 0.2, 0.1, 0.0])),
    ]
    # One step of the large layer is two of the small one. By layers: +0.12 - 0.2 is a gain, by weights +0.24 - 0.2.
    by_layers = LayerError(spread=0.125, weigh="layers", points=5.0).plan(measured, NM(8, 16))
    assert by_layers == {"small": NM(10, 16), "large": NM(7, 16)}
    assert LayerError(spread=0.125, weigh="weights", points=5.0).plan(measured, NM(8, 16)) == {}


def test_percentages_between_those_measured() -> None:
    layers = [
        Measured("a", 0, 0, 4000, Errors(Shape("a", 4, 1000), [0.9, 0.5, 0.3])),  # at 55 %, 50 % and 45 %
        Measured("b", 0, 1, 1000, Errors(Shape("b", 1, 1000), [0.7, 0.5, 0.4])),
    ]
    allocation = LayerError(spread=0.05, weigh="layers", points=5.0)
    # a gains 0.04 a point beyond 50 %; b pays 0.04 a point and gives a quarter of a point to a: nothing to be gained.
    assert allocation.plan(layers, Unstructured(50.0)) == {}
    layers[1] = Measured("b", 0, 1, 1000, Errors(Shape("b", 1, 1000), [0.53, 0.5, 0.49]))
    # Now b pays 0.006 a point: it gives what a can take, four times as large, in whole weights of a row.
    assert allocation.plan(layers, Unstructured(50.0)) == {"a": Unstructured(48.8), "b": Unstructured(54.8)}


def test_straight_lines() -> None:
    assert between([1, 3, 3, 7], [5.0, 1.0, 1.0, 0.0], [1, 2, 3, 4, 7]) == [5.0, 3.0, 1.0, 0.75, 0.0]


@pytest.mark.parametrize("pattern", ["8:16", "2:4", "62.5%"])
def test_a_pruned_model_has_the_mean_density_and_every_layer_its_pattern(pattern: str) -> None:
    _, result = pruned(ERROR, parse(pattern), shuffle=Gns(deal="straight"))
    assert result.pattern_holds
    assert len({report.pattern for report in result.layers}) > 1
    by_order: dict[tuple, set[str]] = {}
    for report in result.layers:
        own, keep_OI = parse(report.pattern), result.keeps[f"{report.name}.weight"]
        order_I = result.orders.get(f"{report.name}.weight", torch.arange(report.shape[1])).long()
        assert own.holds(keep_OI[:, order_I])
        assert report.density == pytest.approx(float(own.keep_top(torch.rand(report.shape)).float().mean()))
        assert abs(report.density - (0.375 if pattern == "62.5%" else 0.5)) <= 0.25 + 0.03
        part = report.name.split(".")[-1]
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(part, part)
        by_order.setdefault((report.name.split(".")[2], shared), set()).add(report.pattern)
    assert len(by_order) == 3 * 4  # q/k/v, o, gate/up, down of each block
    assert all(len(patterns) == 1 for patterns in by_order.values())
    left = (0.375 if pattern == "62.5%" else 0.5) * result.weights - result.kept
    step = {"8:16": 32 * 2, "2:4": 32 * 8, "62.5%": 32}[pattern]  # of o_proj, the smallest: 32 x 32
    assert 0 <= left < step


def test_the_sum_of_errors_on_the_dense_model_falls() -> None:
    """Of the masks by the dense model's scores: what is pruned in the end sees pruned blocks before it."""

    def sum_of_errors(patterns: dict[str, Pattern]) -> float:
        found = 0.0
        for name, (weight_OI, x_TI) in linears(uneven()).items():
            score_OI = Wanda().score(weight_OI, layer(weight_OI, x_TI, NM(8, 16)).stats)
            keep_OI = patterns[name].keep_top(score_OI)
            lost = (x_TI @ weight_OI.masked_fill(keep_OI, 0.0).T).norm() / (x_TI @ weight_OI.T).norm()
            found += float(lost) ** 2
        return found

    chosen = {report.name: parse(report.pattern) for report in pruned(ERROR, NM(8, 16))[1].layers}
    assert sum_of_errors(chosen) < 0.99 * sum_of_errors(dict.fromkeys(chosen, NM(8, 16)))
