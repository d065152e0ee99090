"""Metrics: what a weight is worth. Pure functions of a weight matrix and its input's statistics.

A metric is one file, one dataclass and one line in esparse/cli/registry.py. Files in this folder import torch only
inside their methods, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats


@dataclass(kw_only=True, slots=True)
class Metric(ABC):
    """Scores the weights of one matrix; in each of a pattern's groups the highest scores survive."""

    def collects(self) -> dict[str, Factory]:
        """The statistics of the layer's input that `score` will look up in `stats`, by name; none by default."""
        return {}

    def gradients(self) -> str:
        """none | block | model: of what loss `stats["gradient"]` shall hold the gradients (pruning/gradients.py)."""
        return "none"

    @abstractmethod
    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        """The score of every weight (float32, outputs x inputs), never negative."""
