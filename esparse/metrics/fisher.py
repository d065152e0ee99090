"""Optimal brain damage (LeCun et al. 1989) with the empirical Fisher information as the Hessian's diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.metrics import Metric
from esparse.metrics.gradient import check_source, mean_square_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import LayerStats


@dataclass(kw_only=True, slots=True)
class Fisher(Metric):
    """w^2 E[g^2], with the mean over sequences: w^2 h / 2 estimates the rise of the loss without the weight.

    The Fisher information E[g^2] replaces the curvature h; the factor 1/2 does not change a ranking.
    """

    source: str  # of the gradient: model (of the loss) | block (of the norm of the block's output)

    def __post_init__(self) -> None:
        check_source(self.source)

    def gradients(self) -> str:
        return self.source

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        return weight_OI.square() * mean_square_gradient(weight_OI, stats)
