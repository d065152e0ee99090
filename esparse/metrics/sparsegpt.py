"""The optimal brain surgeon's saliency, as SparseGPT uses it (Frantar & Alistarh 2023, arXiv 2301.00774, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.metrics import Metric
from esparse.parts import bounds

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats


@dataclass(kw_only=True, slots=True)
class SparseGpt(Metric):
    """w^2 / [H^-1]_jj with H the damped Gram matrix: the layer error after pruning only this weight.

    Computed once, from the dense weights. `update=sparsegpt`, which `metric=sparsegpt` implies, recomputes scores for
    every group from the repaired weights, and then only the shuffle uses the scores here.
    """

    # It grows if the matrix is singular, and the log says so
    damp: float  # added to the Gram matrix's diagonal, as a share of its mean

    def __post_init__(self) -> None:
        bounds.check("metric", self, not_negative=("damp",))

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram}

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        # H^-1 = U^T U, so its diagonal is the sum of squares of U's columns.
        inverse_diagonal_I = stats["gram"].inverse_factor(None, self.damp).square().sum(0)
        return weight_OI.square() / inverse_diagonal_I
