"""Variance correction: scales the kept weights so that the weights' variance is as before pruning.

After Maximov et al. 2025 (arXiv 2507.03052), our reconstruction: W_s <- W_s sqrt(Var(W) / Var(W_s)), the variances over
all entries, zeros included. We do not know whether the paper takes them per output or per layer.
Shapes: O outputs, I inputs, R rows whose variance is taken (the outputs, or one), K values of such a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.patterns import Rows
from esparse.recoveries import Recovery

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.updates import Layer, Solution

GRANULARITIES = ("row", "layer")


@dataclass(kw_only=True, slots=True)
class Variance(Recovery):
    """Restores the variance of the weights by one factor per output, or one per layer.

    It does not change a bias shift, so with both corrections the bias comes last.
    """

    granularity: str  # values over which the variance is taken: row (one output) | layer (all)

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise Mistake(f"recovery.granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}")

    def is_idle(self, pattern: Pattern) -> bool:
        return self.granularity == "row" and isinstance(pattern, Rows)  # a kept row has the variance it had

    def layer(self, layer: Layer, pruned: Solution) -> Solution:
        rows = len(layer.dense_OI) if self.granularity == "row" else 1
        scale_R = variance_scale(layer.dense_OI.reshape(rows, -1), pruned.weight_OI.reshape(rows, -1))
        return replace(pruned, weight_OI=pruned.weight_OI * scale_R[:, None])


def variance_scale(dense_RK: Tensor, pruned_RK: Tensor) -> Tensor:
    """The factor for each pruned row; 1 if all values of the dense or of the pruned row are equal."""
    import torch

    spread_R = torch.ones_like(dense_RK[:, 0], dtype=torch.bool)
    for weight_RK in (dense_RK, pruned_RK):
        low_R, high_R = weight_RK.aminmax(dim=1)
        spread_R &= low_R < high_R  # exact; the variance of equal values may be a rounding error instead of 0
    # The ratio is the same for population and sample variances.
    scale_R = (dense_RK.var(1) / pruned_RK.var(1)).sqrt()
    return torch.where(spread_R, scale_R, 1.0)
