"""Allocates densities by each layer's error at each density, measured on the dense model.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.allocations import Allocation, Measured
from esparse.allocations.budget import Shape, Unit, count, spend
from esparse.allocations.reach import others, refuse_what_cannot_change
from esparse.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.stats import Factory
    from esparse.updates import Layer


WEIGH = ("weights", "layers")


@dataclass(frozen=True, slots=True, eq=False)
class Errors:
    """The relative squared errors of one layer under the tried patterns, from the sparsest to the densest."""

    shape: Shape
    errors: list[float]


@dataclass(kw_only=True, slots=True)
class LayerError(Allocation):
    """Chooses the patterns with the least sum of all layers' relative squared errors (our own method).

    The error is tr(D G D^T) / tr(W G W^T), with D the pruned part of the dense weights W and G the Gram matrix of the
    input, for the mask by scores, in the channels' own order and without an update. Layers that read the same tensor
    get the same pattern. For a pattern in per cent, errors are measured at percentages `points` apart and interpolated
    linearly. A layer that no token reached keeps the method's pattern.

    The sum ignores the effect of early blocks' errors on later blocks, hence a small `spread`. With `weigh=layers`,
    attention's small layers gain at the cost of large ones, and one fused layer of q, k and v counts a third of three
    separate ones.
    """

    # A spread that cannot change the pattern is refused: 2:4 has steps of 0.25, 8:16 of 0.0625
    spread: float  # most that the density of a layer may differ from the mean
    weigh: str  # what a layer's error counts in the sum: weights (as many times as it has weights) | layers (once)
    points: float  # with a pattern in per cent: from one percentage that is measured to the next

    def __post_init__(self) -> None:
        if not 0 < self.spread < 1:
            raise Mistake(f"allocation.spread must lie between 0 and 1, got {self.spread}")
        if self.weigh not in WEIGH:
            raise Mistake(f"allocation.weigh must be one of {', '.join(WEIGH)}, got {self.weigh!r}")
        if not 0 < self.points < 100:
            raise Mistake(f"allocation.points must lie between 0 and 100, got {self.points}")

    def check(self, pattern: Pattern) -> None:
        refuse_what_cannot_change("error", pattern, self.spread, reach=self.spread, points=self.points)

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram}

    def measures(self) -> bool:
        return True

    def measure(self, layer: Layer, score_OI: Tensor) -> Errors | None:
        import torch

        if not layer.stats.tokens:
            return None
        gram_II, dense_OI = layer.stats["gram"].gram_II, layer.dense_OI

        def squared(part_OI: Tensor) -> float:
            return float(((part_OI @ gram_II) * part_OI).sum(dtype=torch.float64))

        whole, errors = squared(dense_OI), []
        for pattern in others(layer.grouping.pattern, self.spread, self.points):
            lost = squared(dense_OI.masked_fill(pattern.keep_top(score_OI), 0.0))
            errors.append(lost / whole if whole > 0 else 0.0)
        return Errors(Shape(layer.stats.name, *dense_OI.shape), errors)

    def plan(self, layers: Sequence[Measured], pattern: Pattern) -> dict[str, Pattern]:
        groups: dict[int, list[Errors]] = {}
        for layer in layers:
            if layer.value is not None:
                groups.setdefault(layer.group, []).append(layer.value)
        measured, finer = others(pattern, self.spread, self.points), others(pattern, self.spread)
        units, costs = [], []
        for group in groups.values():
            shapes = [errors.shape for errors in group]
            counts = [count(shapes, other) for other in measured]
            within = [other for other in finer if counts[0] <= count(shapes, other) <= counts[-1]]
            units.append(Unit.of(shapes, pattern, within))
            costs.append(between(counts, self._sums(group), units[-1].kept))
        return spend(units, costs)

    def _sums(self, group: Sequence[Errors]) -> list[float]:
        """The cost of each measured pattern: its errors summed over the layers of one group."""
        counts = [layer.shape.outputs * layer.shape.inputs if self.weigh == "weights" else 1 for layer in group]
        columns = zip(*(layer.errors for layer in group), strict=True)
        return [sum(error * n for error, n in zip(errors, counts, strict=True)) for errors in columns]


def between(x: Sequence[float], y: Sequence[float], at: Sequence[float]) -> list[float]:
    """Linear interpolation of y at `at`; x must not fall, and `at` must lie within its range."""
    values = []
    for place in at:
        right = bisect_left(x, place)
        if x[right] == place:
            values.append(y[right])
        else:
            share = (place - x[right - 1]) / (x[right] - x[right - 1])
            values.append((1 - share) * y[right - 1] + share * y[right])
    return values
