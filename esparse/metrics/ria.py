"""Relative importance and activations (Zhang et al., ICLR 2024, OpenReview Tr0lPx9woF)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.metrics import Metric
from esparse.parts import bounds

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats


@dataclass(kw_only=True, slots=True)
class Ria(Metric):
    """The weight's share of its column and of its row, times a power of its channel's norm."""

    power: float  # of the norm; the paper's a

    def __post_init__(self) -> None:
        bounds.check("metric", self, not_negative=("power",))

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnNorm

        return {"norm": ColumnNorm}

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        return relative_importance(weight_OI) * stats["norm"].norm_I("sequence") ** self.power


def relative_importance(weight_OI: Tensor) -> Tensor:
    """|W_ij| / sum_i' |W_i'j| + |W_ij| / sum_j' |W_ij'|, and 0 in a row or column of zeros."""
    size_OI = weight_OI.abs()
    columns_I = size_OI.sum(0, keepdim=True).clamp_min(1e-30)
    rows_O = size_OI.sum(1, keepdim=True).clamp_min(1e-30)
    return size_OI / columns_I + size_OI / rows_O
