"""Wanda (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats


@dataclass(kw_only=True, slots=True)
class Wanda(Metric):
    """|w| times the norm of the weight's input channel."""

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnNorm

        return {"norm": ColumnNorm}

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        # eq. 1: S_ij = |W_ij| * ||X_j||_2; the convention of the norm cannot change a ranking within a row.
        return weight_OI.abs() * stats["norm"].norm_I("sequence")
