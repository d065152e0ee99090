"""E-Sparse's metric (Li et al. 2023, arXiv 2310.15929): the channel's entropy plus its norm, times |w|.

The paper gives K = 100 bins, but not for certain alpha, the base of the logarithm, the bins' range and the norm's
convention. Here the logarithm is natural, and the others are settings. The norm's convention is part of the method: an
entropy is at most ln K = 4.6, and vanishes beside a norm summed over all tokens.

Other measures of the weight can replace |w|, which gives mixtures with RIA and NoWag.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.metrics import Metric
from esparse.metrics.nowag import normalised
from esparse.metrics.ria import relative_importance

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats


@dataclass(kw_only=True, slots=True)
class Entropy(Metric):
    """|w|, or its replacement `base`, times (entropy of the channel + alpha times its norm)."""

    base: str  # in place of |w|: magnitude (|w| itself) | ria (relative importance) | nowag (normalised, absolute)
    alpha: float  # weight of the norm beside the entropy
    bins: int  # histogram bins per input channel
    norm: str  # sequence (Wanda's: root of the mean over sequences of the sum of squares) | rms (per token) | total
    # For channel and layer the tokens are looked at twice: inputs that were kept if there is room, else one more pass
    range: str  # the histogram spans: channel (each channel's own range) | layer (all channels') | fixed (+- limit)
    limit: float  # the bound of a fixed range, in units of the activations

    def __post_init__(self) -> None:
        for setting, value, known in (
            ("base", self.base, ("magnitude", "ria", "nowag")),
            ("norm", self.norm, ("sequence", "rms", "total")),
            ("range", self.range, ("channel", "layer", "fixed")),
        ):
            if value not in known:
                raise Mistake(f"metric.{setting} must be one of {', '.join(known)}, got {value!r}")
        if self.bins < 2:
            raise Mistake(f"metric.bins must be at least 2, since one bin has no entropy; got {self.bins}")
        if self.limit <= 0:
            raise Mistake(f"metric.limit must be positive, got {self.limit:g}")

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnEntropy, ColumnNorm

        return {
            "norm": ColumnNorm,
            "entropy": partial(ColumnEntropy, bins=self.bins, range=self.range, limit=self.limit),
        }

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        # xi_cj = |w_cj| * (IR_c + alpha * ||x_c||)
        channel_I = stats["entropy"].entropy_I() + self.alpha * stats["norm"].norm_I(self.norm)
        return self._size(weight_OI) * channel_I

    def _size(self, weight_OI: Tensor) -> Tensor:
        if self.base == "ria":
            return relative_importance(weight_OI)
        return (normalised(weight_OI) if self.base == "nowag" else weight_OI).abs()
