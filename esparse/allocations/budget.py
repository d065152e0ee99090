"""Chooses one pattern per unit: the least sum of costs with no more kept weights than the uniform pattern has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heapify, heappop, heappush

from esparse.patterns import Outliers, Pattern

LARGEST = 2 * 10**8  # most sums that the exact search tries, which takes about a second


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer's name and size."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that get the same pattern, and the patterns that they may get, from the sparsest to the densest.

    `kept[k]` (strictly ascending) is the number of their weights that `patterns[k]` keeps.
    """

    names: tuple[str, ...]
    weights: int
    patterns: tuple[Pattern, ...]
    kept: tuple[int, ...]
    asked: int  # index of the method's pattern

    @classmethod
    def of(cls, layers: Sequence[Shape], asked: Pattern, patterns: Sequence[Pattern]) -> Unit:
        """The unit of these layers; of patterns that keep equally many weights, only the nearest to `asked` counts.

        `patterns` ascend in density and include `asked`.
        """
        place = patterns.index(asked)
        by_kept: dict[int, Pattern] = {}
        for _, pattern in sorted(enumerate(patterns), key=lambda numbered: abs(numbered[0] - place)):
            by_kept.setdefault(count(layers, pattern), pattern)
        kept = sorted(by_kept)
        return cls(
            names=tuple(layer.name for layer in layers),
            weights=sum(layer.outputs * layer.inputs for layer in layers),
            patterns=tuple(by_kept[one] for one in kept),
            kept=tuple(kept),
            asked=kept.index(count(layers, asked)),
        )


def count(layers: Sequence[Shape], pattern: Pattern) -> int:
    """The number of weights of these layers that the pattern keeps, without outliers (the same for every base)."""
    return sum(layer.outputs * _of_row(pattern, layer.inputs) for layer in layers)


@cache
def _of_row(pattern: Pattern, inputs: int) -> int:
    import torch

    counted = pattern.base if isinstance(pattern, Outliers) else pattern
    return int(counted.keep_top(torch.zeros(1, inputs, dtype=torch.float32)).sum())


def spend(units: Sequence[Unit], costs: Sequence[Sequence[float]]) -> dict[str, Pattern]:
    """The patterns with the least sum of costs within the budget, by layer; omits layers with the method's pattern.

    `costs[u][k]` is the cost of pattern k of unit u. The budget is the number of weights that the uniform pattern
    keeps; at the end no unit's next pattern fits into it. The sum is the minimum, unless the model has so many units
    and patterns that the exact search would take long (LARGEST). Then every unit starts at its sparsest pattern, and
    the step that saves most per weight is taken until none fits; with convex costs, the loss against the minimum is at
    most what the last steps save. A choice that is not better than the uniform one is discarded.

    Where m does not divide the widths, what one unit gains no other may be able to lose exactly. If a choice leaves
    more of the budget than half a step of all units, the least sum is searched among those that leave no more.
    """
    uniform = [unit.asked for unit in units]
    budget = sum(unit.kept[unit.asked] - unit.kept[0] for unit in units)
    most_left = sum(_step(unit) for unit in units) // 2
    for may_be_left in (budget, most_left):
        chosen = _cheapest(units, costs, budget, may_be_left)
        if _fill(units, costs, chosen, budget) <= most_left:
            break
    else:
        chosen = uniform
    if _sum(costs, chosen) >= _sum(costs, uniform):
        chosen = uniform
    return {
        name: unit.patterns[at]
        for unit, at in zip(units, chosen, strict=True)
        if at != unit.asked
        for name in unit.names
    }


def _step(unit: Unit) -> int:
    """The number of weights between the pattern asked for and the next, in either direction."""
    around = unit.kept[max(0, unit.asked - 1) : unit.asked + 2]
    return max((after - before for before, after in itertools.pairwise(around)), default=0)


def _cheapest(units: Sequence[Unit], costs: Sequence[Sequence[float]], budget: int, may_be_left: int) -> list[int]:
    """The indices of the patterns with the least sum of costs (a knapsack, by dynamic programming); 0s if too many.

    Of the budget at most `may_be_left` weights are left.
    """
    import torch

    sizes = [[kept - unit.kept[0] for kept in unit.kept] for unit in units]
    quantum = math.gcd(budget, *itertools.chain(*sizes)) or 1
    most = budget // quantum
    if sum(map(len, sizes)) * most > LARGEST:
        return [0] * len(units)
    # Shapes: B = budgets from 0 to `most` quanta, K = patterns of one unit.
    least_B = torch.zeros(most + 1, dtype=torch.float64)
    least_B[may_be_left // quantum + 1 :] = math.inf
    choices = []
    for size, cost in zip(sizes, costs, strict=True):
        sum_KB = torch.full((len(size), most + 1), math.inf, dtype=torch.float64)
        for row_B, weights, value in zip(sum_KB, size, cost, strict=True):
            if weights <= budget:
                row_B[weights // quantum :] = least_B[: most + 1 - weights // quantum] + value
        least_B, choice_B = sum_KB.min(dim=0)
        choices.append(choice_B.int())
    chosen = []
    for size, choice_B in zip(reversed(sizes), reversed(choices), strict=True):
        chosen.append(int(choice_B[most]))
        most -= size[chosen[-1]] // quantum
    return chosen[::-1]


def _fill(units: Sequence[Unit], costs: Sequence[Sequence[float]], chosen: list[int], budget: int) -> int:
    """Takes steps, in place, the one that saves most per weight first, until none fits into the rest of the budget.

    Returns the rest.
    """

    def step(place: int) -> tuple[float, int, int]:
        at, kept, cost = chosen[place], units[place].kept, costs[place]
        size = kept[at + 1] - kept[at]
        return (cost[at + 1] - cost[at]) / size, place, size  # ties go to the first unit

    def has_next(place: int) -> bool:
        return chosen[place] + 1 < len(units[place].kept)

    left = budget - sum(unit.kept[at] - unit.kept[0] for unit, at in zip(units, chosen, strict=True))
    ahead = [step(place) for place in range(len(units)) if has_next(place)]
    heapify(ahead)
    while ahead:
        _, place, size = heappop(ahead)
        if size <= left:
            left -= size
            chosen[place] += 1
            if has_next(place):
                heappush(ahead, step(place))
    return left


def _sum(costs: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return sum(cost[at] for cost, at in zip(costs, chosen, strict=True))
