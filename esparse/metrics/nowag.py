"""NoWag-P: weights normalised by column and row, times the mean square of the input (Liu et al. 2025, 2504.14569)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats


@dataclass(kw_only=True, slots=True)
class NoWag(Metric):
    """Wbar_ij^2 E[x_j^2]; Wbar is W divided by its columns' l2 norms, then by its rows' norms."""

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnNorm

        return {"norm": ColumnNorm}

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        return normalised(weight_OI).square() * stats["norm"].norm_I("rms").square()


def normalised(weight_OI: Tensor) -> Tensor:
    """Wbar: the weights divided by their columns' l2 norms, then by their rows'; 0 in rows and columns of zeros."""
    by_column_OI = weight_OI / weight_OI.norm(dim=0, keepdim=True).clamp_min(1e-30)
    return by_column_OI / by_column_OI.norm(dim=1, keepdim=True).clamp_min(1e-30)
