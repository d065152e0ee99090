"""The choice under a budget: against all assignments, and never above what would survive uniformly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.allocations import budget
from esparse.allocations.budget import Shape, Unit, count, spend
from esparse.allocations.reach import others
from esparse.patterns import NM, Outliers, Pattern, Unstructured
from tests.allocations.layers import chosen


@pytest.fixture(params=["exact", "greedy"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the search for the least sum, and as where a model is too large for it."""
    if request.param == "greedy":
        monkeypatch.setattr(budget, "LARGEST", -1)
    return request.param


def units_of(sizes: Sequence[tuple[int, int]], pattern: Pattern, reach: float = 0.99) -> list[Unit]:
    """One unit for each size (outputs, inputs)."""
    patterns = others(pattern, reach, 5.0)
    return [Unit.of([Shape(f"layer{k}", *size)], pattern, patterns) for k, size in enumerate(sizes)]


def kept(units: Sequence[Unit], places: Sequence[int]) -> int:
    return sum(unit.kept[place] for unit, place in zip(units, places, strict=True))


def total(costs: Sequence[Sequence[float]], places: Sequence[int]) -> float:
    return sum(cost[place] for cost, place in zip(costs, places, strict=True))


def uniform(units: Sequence[Unit]) -> list[int]:
    return [unit.asked for unit in units]


def least(units: Sequence[Unit], costs: Sequence[Sequence[float]]) -> float:
    """By trying every assignment."""
    allowed = kept(units, uniform(units))
    every = itertools.product(*(range(len(unit.patterns)) for unit in units))
    return min(total(costs, places) for places in every if kept(units, places) <= allowed)


@st.composite
def problems(draw: st.DrawFn, outputs: st.SearchStrategy[int], falling: bool) -> tuple[list[Unit], list[list[float]]]:
    """Up to four units of n:m with costs that fall convexly or, otherwise, as they like."""
    m = draw(st.integers(3, 6))
    pattern = NM(draw(st.integers(1, m - 1)), m)
    sizes = [(draw(outputs), 2 * m) for _ in range(draw(st.integers(1, 4)))]
    units = units_of(sizes, pattern)
    costs = []
    for unit in units:
        steps = draw(st.lists(st.integers(1, 100), min_size=len(unit.patterns), max_size=len(unit.patterns)))
        gains = sorted(steps, reverse=True)
        costs.append(
            [float(sum(gains[place:])) for place in range(len(gains))] if falling else [float(s) for s in steps]
        )
    return units, costs


@given(problem=problems(st.integers(1, 9), falling=True))
def test_the_least_sum_of_all_assignments(problem: tuple[list[Unit], list[list[float]]]) -> None:
    units, costs = problem
    assert total(costs, chosen(units, spend(units, costs))) == least(units, costs)


@given(problem=problems(st.just(3), falling=True))
def test_steps_by_what_they_save_find_it_too_where_all_are_of_one_size(
    problem: tuple[list[Unit], list[list[float]]],
) -> None:
    units, costs = problem
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(budget, "LARGEST", -1)
        assert total(costs, chosen(units, spend(units, costs))) == least(units, costs)


@pytest.mark.parametrize("largest", [-1, 10**9])
@given(problem=problems(st.integers(1, 9), falling=False))
def test_the_budget_is_kept_and_spent_whatever_the_costs(
    largest: int, problem: tuple[list[Unit], list[list[float]]]
) -> None:
    units, costs = problem
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(budget, "LARGEST", largest)
        places = chosen(units, spend(units, costs))
    left = kept(units, uniform(units)) - kept(units, places)
    assert left >= 0
    for unit, place in zip(units, places, strict=True):
        assert place + 1 == len(unit.patterns) or unit.kept[place + 1] - unit.kept[place] > left
    assert total(costs, places) <= total(costs, uniform(units))


def test_by_hand(either: str) -> None:
    units = units_of([(1, 4), (1, 4), (1, 4)], NM(2, 4))
    costs = [[9.0, 1.0, 0.0], [9.0, 5.0, 2.0], [3.0, 2.0, 1.0]]
    plan = spend(units, costs)  # the steps save 8, 1; 4, 3; 1, 1, and three of them are to be had
    assert plan == {"layer1": NM(3, 4), "layer2": NM(1, 4)}


def test_what_a_step_saves_is_taken_per_weight(either: str) -> None:
    units = units_of([(1, 4), (1, 4), (2, 4)], NM(2, 4))
    plan = spend(units, [[6.0, 3.0, 0.0], [6.0, 3.0, 0.0], [8.0, 4.0, 0.0]])  # 3 for one weight, 4 for two
    assert plan == {"layer0": NM(3, 4), "layer1": NM(3, 4), "layer2": NM(1, 4)}


def test_what_saves_nothing_is_not_done(either: str) -> None:
    units = units_of([(2, 8), (1, 8)], NM(4, 8))
    assert spend(units, [[0.0] * 7, [0.0] * 7]) == {}
    assert spend(units, [[float(abs(n - 4)) for n in range(1, 8)]] * 2) == {}
    assert spend([], []) == {}


def test_layers_of_a_unit_share_its_pattern(either: str) -> None:
    pattern = NM(2, 4)
    first = Unit.of([Shape("q", 4, 8), Shape("k", 2, 8)], pattern, others(pattern, 0.25))
    second = Unit.of([Shape("down", 6, 8)], pattern, others(pattern, 0.25))
    assert first.kept == (12, 24, 36)
    plan = spend([first, second], [[9.0, 3.0, 0.0], [2.0, 1.0, 0.0]])
    assert plan == {"q": NM(3, 4), "k": NM(3, 4), "down": NM(1, 4)}


@pytest.mark.parametrize("pattern", [NM(2, 5), NM(3, 8), Unstructured(62.5), Unstructured(33.3)], ids=str)
@pytest.mark.parametrize("inputs", [3, 32, 47])
def test_survivors_are_counted_as_the_pattern_leaves_them(pattern: Pattern, inputs: int) -> None:
    scores_OI = torch.rand(6, inputs, generator=torch.Generator().manual_seed(inputs))
    halves = [Shape("a", 4, inputs), Shape("b", 2, inputs)]
    assert count(halves, pattern) == int(pattern.keep_top(scores_OI).sum())


def test_outliers_do_not_count() -> None:
    assert count([Shape("a", 3, 32)], Outliers(NM(2, 4), NM(1, 16))) == 3 * 16


def test_of_patterns_that_keep_as_much_the_nearest_to_the_one_asked_for_stands() -> None:
    asked = Unstructured(50.0)
    unit = Unit.of([Shape("a", 2, 10)], asked, others(asked, 0.2))  # rows of 10: 3 to 7 survive
    assert unit.kept == (6, 8, 10, 12, 14)
    assert [p.removed_percent for p in unit.patterns] == [70.0, 60.0, 50.0, 49.9, 39.9]
    assert unit.patterns[unit.asked] == asked


def left_of(units: Sequence[Unit], wishes: Sequence[float]) -> int:
    """Of the budget, with costs as OWL's: squared distances to densities above or below the uniform one."""
    return kept(units, uniform(units)) - kept(units, chosen(units, spend(units, distances(units, wishes))))


def distances(units: Sequence[Unit], wishes: Sequence[float]) -> list[list[float]]:
    costs = []
    for unit, wish in zip(units, wishes, strict=True):
        asked = unit.kept[unit.asked] / unit.weights
        costs.append([unit.weights * (one / unit.weights - asked - wish) ** 2 for one in unit.kept])
    return costs


def blocks_of(layers: Sequence[tuple[int, int]], pattern: Pattern, blocks: int) -> list[Unit]:
    patterns = others(pattern, 0.25)
    shapes = [[Shape(f"{b}.{k}", *size) for k, size in enumerate(layers)] for b in range(blocks)]
    return [Unit.of(of_block, pattern, patterns) for of_block in shapes]


@pytest.mark.parametrize("largest", [-1, budget.LARGEST])
@given(
    layers=st.lists(st.tuples(st.integers(1, 40), st.integers(5, 70)), min_size=1, max_size=2),
    pattern=st.sampled_from([NM(8, 16), NM(4, 8), NM(16, 32), Unstructured(60.0)]),
    wishes=st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=5),
)
def test_where_m_does_not_divide_the_widths_at_most_half_a_step_is_left(
    largest: int, layers: list[tuple[int, int]], pattern: Pattern, wishes: list[float]
) -> None:
    units = blocks_of(layers, pattern, len(wishes))
    mean = sum(wishes) / len(wishes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(budget, "LARGEST", largest)
        left = left_of(units, [wish - mean for wish in wishes])
    steps = 0
    for unit in units:
        around = range(max(1, unit.asked), min(unit.asked + 2, len(unit.kept)))
        steps += max((unit.kept[k] - unit.kept[k - 1] for k in around), default=0)
    assert 0 <= left <= steps / 2


@pytest.mark.parametrize("largest", [-1, budget.LARGEST])
def test_of_two_blocks_with_tails_one_gains_what_the_other_loses(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For 9:16 in one block 6:16 in the other would fit, and 70 of 1542 weights fewer would survive than uniformly."""
    monkeypatch.setattr(budget, "LARGEST", largest)
    units = blocks_of([(3, 12), (35, 21)], NM(8, 16), 2)
    half_a_group = sum(unit.weights for unit in units) / 32
    assert left_of(units, [0.1, -0.1]) <= half_a_group < 70
    if largest > 0:
        plan = spend(units, distances(units, [0.1, -0.1]))
        assert (plan["0.0"], plan["1.0"]) == (NM(10, 16), NM(5, 16))
