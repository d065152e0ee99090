"""Allocations: which layer gets which density, at a fixed mean.

An allocation that is not uniform first walks once through the dense model and measures every layer, then decides for
all of them at once. Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.stats import Factory
    from esparse.updates import Layer


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One layer of the dense model, and what `Allocation.measure` made of it."""

    name: str
    block: int
    group: int  # layers with the same number read the same tensor
    weights: int
    value: Any


@dataclass(kw_only=True, slots=True)
class Allocation(ABC):
    """A way to spread the weights that survive over the layers."""

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError where the settings make no sense for this pattern; called before anything runs."""
        return None

    def collects(self) -> dict[str, Factory]:
        """The statistics of a layer's input that `measure` will look up in `layer.stats`, by name."""
        return {}

    @abstractmethod
    def measures(self) -> bool:
        """Whether the dense model has to be walked through first."""

    @abstractmethod
    def measure(self, layer: Layer, score_OI: Tensor) -> Any:
        """What the plan needs to know of a dense layer whose weights have these scores."""

    @abstractmethod
    def plan(self, layers: Sequence[Measured], pattern: Pattern) -> dict[str, Pattern]:
        """The pattern of each layer by its name; a layer without an entry gets the pattern that was asked for."""


@dataclass(kw_only=True, slots=True)
class Uniform(Allocation):
    """Every layer gets the pattern that was asked for."""

    def measures(self) -> bool:
        return False

    def measure(self, layer: Layer, score_OI: Tensor) -> None:
        return None

    def plan(self, layers: Sequence[Measured], pattern: Pattern) -> dict[str, Pattern]:
        return {}
