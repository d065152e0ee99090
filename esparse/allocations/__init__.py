"""Allocations: choose the density of each layer, at a fixed mean.

Allocations other than `uniform` first run the dense model once and measure every layer, then decide for all layers at
once. Shapes: O outputs, I inputs.
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
    """One layer of the dense model, and the result of `Allocation.measure` for it."""

    name: str
    block: int
    group: int  # layers with the same number read the same tensor
    weights: int
    value: Any


@dataclass(kw_only=True, slots=True)
class Allocation(ABC):
    """Base class of allocations: distributes the kept weights over the layers."""

    def check(self, pattern: Pattern) -> None:
        """Raises Mistake if the settings do not fit this pattern; called before anything runs."""
        return None

    def collects(self) -> dict[str, Factory]:
        """The input statistics that `measure` finds in `layer.stats`, by name."""
        return {}

    @abstractmethod
    def measures(self) -> bool:
        """Whether a pass over the dense model comes first."""

    @abstractmethod
    def measure(self, layer: Layer, score_OI: Tensor) -> Any:
        """Measures what `plan` needs about a dense layer, given the scores of its weights."""

    @abstractmethod
    def plan(self, layers: Sequence[Measured], pattern: Pattern) -> dict[str, Pattern]:
        """The pattern of each layer, by name; a layer without an entry gets the method's pattern."""


@dataclass(kw_only=True, slots=True)
class Uniform(Allocation):
    """Every layer gets the method's pattern."""

    def measures(self) -> bool:
        return False

    def measure(self, layer: Layer, score_OI: Tensor) -> None:
        return None

    def plan(self, layers: Sequence[Measured], pattern: Pattern) -> dict[str, Pattern]:
        return {}
