"""Wanda's norm plus gradients: GBLM (Das et al. 2023, arXiv 2311.04902), Wanda++ (Yang et al. 2025, 2503.04992).

Both add a multiple of the weight's gradient to Wanda's norm: GBLM the gradient of the language model's loss, Wanda++
that of the l2 norm of the block's output ("regional"). ||g|| is here the root of the mean over sequences of the squared
gradient, as in Wanda++. GBLM's code takes the root of the sum: its alpha of 100 is 100 * sqrt(sequences) here, 1131
for 128 sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.metrics import Metric
from esparse.parts import bounds

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats


@dataclass(kw_only=True, slots=True)
class Gradient(Metric):
    """|w| times (alpha times the size of the weight's gradient + the norm of its input channel)."""

    source: str  # of the gradient: model (the loss; GBLM) | block (the norm of the block's output; Wanda++)
    # GBLM's code takes the root of the sum over sequences: its 100 is 100 * sqrt(sequences) here, 1131 for 128
    alpha: float  # weight of the gradient (root of the mean over sequences) beside the norm

    def __post_init__(self) -> None:
        check_source(self.source)
        bounds.check("metric", self, not_negative=("alpha",))

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnNorm

        return {"norm": ColumnNorm}

    def gradients(self) -> str:
        return self.source

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        # S_ij = |W_ij| * (alpha * ||G_ij|| + ||X_j||)
        gradient_OI = mean_square_gradient(weight_OI, stats).sqrt()
        return weight_OI.abs() * (self.alpha * gradient_OI + stats["norm"].norm_I("sequence"))


def check_source(source: str) -> None:
    """Raises Mistake for an unknown `source`."""
    if source not in ("model", "block"):
        raise Mistake(f"metric.source must be one of model, block, got {source!r}")


def mean_square_gradient(weight_OI: Tensor, stats: LayerStats) -> Tensor:
    """E[g^2] over sequences, on the weight's device (the squares of a whole model are on the host)."""
    mean_square_OI: Tensor = stats["gradient"].mean_square_OI
    return mean_square_OI.to(weight_OI.device)
