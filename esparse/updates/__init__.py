"""Updates: what happens to a layer once its scores have chosen a keep mask.

An update may change the surviving weights, the mask, or both. Each takes the layer as the one before left it, so that
updates can be put in a row (`Then`).

Shapes: O outputs, I inputs. Polarity: True in `keep` means the weight survives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Grouping, Pattern
    from esparse.stats import Factory, LayerStats


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What an update may look at: the dense weights (float32), how groups are cut, and the input's statistics."""

    dense_OI: Tensor
    grouping: Grouping
    stats: LayerStats


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A layer's weights (float32) and which of them survive; the weights are 0 wherever `keep_OI` is False.

    `bias_shift_O`, if given, is to be added to the layer's bias.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    bias_shift_O: Tensor | None = None

    @classmethod
    def without_update(cls, dense_OI: Tensor, keep_OI: Tensor) -> Solution:
        """The kept weights as they are."""
        return cls((dense_OI * keep_OI).add_(0.0), keep_OI)  # which makes 0.0 of -0.0


@dataclass(kw_only=True, slots=True)
class Update(ABC):
    """Improves a pruned layer."""

    def collects(self) -> dict[str, Factory]:
        """The statistics of the layer's input that `apply` will look up in `layer.stats`, by name; none by default."""
        return {}

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError where the update makes no sense for this pattern; called before anything runs."""
        return None

    def by_rows(self, pattern: Pattern) -> bool:
        """Whether what becomes of a row depends on no other, so that layers that read one tensor may come as one."""
        return False

    @abstractmethod
    def apply(self, layer: Layer, start: Solution) -> Solution:
        """The layer after the update, where `start` is how the metric, or the update before, left it."""


@dataclass(kw_only=True, slots=True)
class NoUpdate(Update):
    """The kept weights keep their values (E-Sparse, Wanda)."""

    def apply(self, layer: Layer, start: Solution) -> Solution:
        return start


@dataclass(kw_only=True, slots=True)
class Chain(Update):
    """Two updates in a row."""

    first: Update  # the update that acts first; its settings stand behind it: `update.first.damp=0.1`
    second: Update  # the one that acts on what the first left: `update.second.steps=50`

    def collects(self) -> dict[str, Factory]:
        return self.first.collects() | self.second.collects()

    def check(self, pattern: Pattern) -> None:
        self.first.check(pattern)
        self.second.check(pattern)

    def by_rows(self, pattern: Pattern) -> bool:
        return self.first.by_rows(pattern) and self.second.by_rows(pattern)

    def apply(self, layer: Layer, start: Solution) -> Solution:
        return self.second.apply(layer, self.first.apply(layer, start))
