"""Updates: change a layer's weights, its keep mask, or both, after its scores have chosen a mask.

An update starts from the result of the update before it, so that updates can be chained (`Chain`).

Shapes: O outputs, I inputs. Polarity: True in `keep` means the weight is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Grouping, Pattern
    from esparse.quantise import Scales
    from esparse.quantise.grids import Grid
    from esparse.stats import Factory, LayerStats


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What an update may use: the dense weights (float32), the grouping, and the input's statistics."""

    dense_OI: Tensor
    grouping: Grouping
    stats: LayerStats


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A layer's weights (float32) and its keep mask; weights are 0 if `keep_OI` is False.

    `bias_shift_O`, if given, is to be added to the layer's bias. `scales`: of weights that lie on a grid.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    bias_shift_O: Tensor | None = None
    scales: Scales | None = None

    @classmethod
    def without_update(cls, dense_OI: Tensor, keep_OI: Tensor) -> Solution:
        """The dense values of the kept weights."""
        return cls((dense_OI * keep_OI).add_(0.0), keep_OI)  # adding 0.0 turns -0.0 into 0.0

    def rows(self, part: slice) -> Solution:
        """That of some rows, before a recovery."""
        scales = None if self.scales is None else self.scales.rows(part)
        return Solution(self.weight_OI[part], self.keep_OI[part], None, scales)


@dataclass(kw_only=True, slots=True)
class Update(ABC):
    """Base class of updates."""

    def collects(self) -> dict[str, Factory]:
        """The input statistics that `apply` finds in `layer.stats`, by name; default: none."""
        return {}

    def needs_dense_stream(self) -> bool:
        """Whether the inputs that the layer would have if no block before it were pruned are needed, too."""
        return False

    def sequential_layers(self) -> bool:
        """Whether a layer's inputs are to be observed again once the layers before it in its block are pruned."""
        return False

    def check(self, pattern: Pattern) -> None:
        """Raises Mistake if the update does not fit this pattern; called before anything runs."""
        return None

    def is_idle(self, pattern: Pattern) -> bool:
        """Whether the update changes nothing under this pattern, whatever the weights."""
        return False

    def by_rows(self, pattern: Pattern) -> bool:
        """Whether rows are updated independently, so that layers with one input may be updated as one stacked layer."""
        return False

    @abstractmethod
    def apply(self, layer: Layer, start: Solution) -> Solution:
        """The layer after the update; `start`: the layer after the metric, or after the update before."""

    def apply_rounding(self, layer: Layer, start: Solution, grid: Grid) -> Solution:
        """As `apply`; an update that can round on its way does, and its solution has scales then."""
        return self.apply(layer, start)


@dataclass(kw_only=True, slots=True)
class NoUpdate(Update):
    """Changes nothing: kept weights keep their values (E-Sparse, Wanda)."""

    def apply(self, layer: Layer, start: Solution) -> Solution:
        return start


@dataclass(kw_only=True, slots=True)
class Chain(Update):
    """Two updates, one after the other."""

    # Its settings stand behind it: `update.first.damp=0.1`. Another one is chosen by `update@update.first=alps`
    first: Update  # the update that acts first
    # Likewise: `update.second.steps=50`, `update@update.second=support`
    second: Update  # the one that acts on what the first left

    def collects(self) -> dict[str, Factory]:
        return self.first.collects() | self.second.collects()

    def needs_dense_stream(self) -> bool:
        return self.first.needs_dense_stream() or self.second.needs_dense_stream()

    def sequential_layers(self) -> bool:
        return self.first.sequential_layers() or self.second.sequential_layers()

    def check(self, pattern: Pattern) -> None:
        self.first.check(pattern)
        self.second.check(pattern)

    def is_idle(self, pattern: Pattern) -> bool:
        return self.first.is_idle(pattern) and self.second.is_idle(pattern)

    def by_rows(self, pattern: Pattern) -> bool:
        return self.first.by_rows(pattern) and self.second.by_rows(pattern)

    def apply(self, layer: Layer, start: Solution) -> Solution:
        return self.second.apply(layer, self.first.apply(layer, start))

    def apply_rounding(self, layer: Layer, start: Solution, grid: Grid) -> Solution:
        return self.second.apply_rounding(layer, self.first.apply(layer, start), grid)
