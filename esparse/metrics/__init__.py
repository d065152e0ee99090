"""Metrics: score weights, as pure functions of a weight matrix and its input's statistics.

A metric is one file, one dataclass and one line in esparse/records/groups.py. Files in this folder import torch only
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
    """Base class of metrics: scores a matrix's weights; the highest scores of each group of the pattern are kept."""

    def collects(self) -> dict[str, Factory]:
        """The input statistics that `score` finds in `stats`, by name; default: none."""
        return {}

    def gradients(self) -> str:
        """The loss whose gradients `stats["gradient"]` holds: none | block | model (pruning/gradients.py)."""
        return "none"

    @abstractmethod
    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        """The scores of all weights (float32, outputs x inputs), never negative."""
