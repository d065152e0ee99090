"""Magnitude: |w|, the classical baseline (Han et al. 2015, arXiv 1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import LayerStats


@dataclass(kw_only=True, slots=True)
class Magnitude(Metric):
    """|w|; uses no data."""

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        return weight_OI.abs()
