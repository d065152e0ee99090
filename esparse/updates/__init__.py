"""Updates: what happens to the surviving weights of a layer once its keep mask is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats


@dataclass(kw_only=True, slots=True)
class Update(ABC):
    """Chooses new values for the weights that survive."""

    def collects(self) -> dict[str, Factory]:
        """The statistics of the layer's input that `weights` will look up in `stats`, by name; none by default."""
        return {}

    @abstractmethod
    def weights(self, weight_OI: Tensor, keep_OI: Tensor, stats: LayerStats) -> Tensor:
        """The layer's new weights (float32, outputs x inputs), +0.0 wherever `keep_OI` is False."""


@dataclass(kw_only=True, slots=True)
class NoUpdate(Update):
    """The survivors keep their values (E-Sparse, Wanda)."""

    def weights(self, weight_OI: Tensor, keep_OI: Tensor, stats: LayerStats) -> Tensor:
        # Not weight * keep: a product leaves -0.0, on which packing kernels were seen to fail.
        return weight_OI.masked_fill(~keep_OI, 0.0)
