"""E-Sparse's metric: what the entropy of an input channel and its norm say together, times |w|.

Li et al. 2023, arXiv 2310.15929. The paper adds the two: `metric=esparse_paper`. A sum mixes units: the norm of Wanda
grows with the root of a sequence's length, an entropy is at most ln K, and on a language model the entropies of a
layer's channels are alike, so that the sum mostly moves Wanda's score towards |w| alone. `metric=entropy` multiplies
the norm by a power of the entropy relative to the layer's mean, which no length and no unit changes
(experiments/LOG.md, "What the entropy is worth").

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
from esparse.parts import bounds

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory, LayerStats

MOST_BINS = 2**16  # of each channel; float16 has as many values
LEAST_SHARE = 1e-3  # of the mean entropy: a channel that never changes has none, of which no power is negative


@dataclass(kw_only=True, slots=True)
class Entropy(Metric):
    """|w|, or its replacement `base`, times the channel's norm times (its entropy / the layer's mean)^gamma."""

    base: str  # in place of |w|: magnitude (|w| itself) | ria (relative importance) | nowag (normalised, absolute)
    gamma: float  # power of the entropy's share; 0: Wanda's score
    bins: int  # histogram bins per input channel
    # For channel and layer the tokens are looked at twice: inputs that were kept if there is room, else one more pass
    range: str  # the histogram spans: channel (each channel's own range) | layer (all channels') | fixed (+- limit)
    limit: float  # the bound of a fixed range, in units of the activations

    def __post_init__(self) -> None:
        _check(base=self.base, range=self.range, bins=self.bins)
        bounds.check("metric", self, finite=("gamma",), positive=("limit",))

    def collects(self) -> dict[str, Factory]:
        return _statistics(self.bins, self.range, self.limit)

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        entropy_I = stats["entropy"].entropy_I()
        share_I = entropy_I / entropy_I.mean().clamp_min(LEAST_SHARE)
        channel_I = stats["norm"].norm_I("sequence") * share_I.clamp_min(LEAST_SHARE) ** self.gamma
        return _size(weight_OI, self.base) * channel_I


@dataclass(kw_only=True, slots=True)
class EsparsePaper(Metric):
    """|w|, or its replacement `base`, times (entropy of the channel + alpha times its norm), as the paper has it.

    The paper gives K = 100 bins, but not for certain alpha, the base of the logarithm, the bins' range and the norm's
    convention. Here the logarithm is natural, and the others are settings. The norm's convention is part of the method:
    an entropy is at most ln K = 4.6, and vanishes beside a norm summed over all tokens.
    """

    base: str  # in place of |w|: magnitude (|w| itself) | ria (relative importance) | nowag (normalised, absolute)
    alpha: float  # weight of the norm beside the entropy
    bins: int  # histogram bins per input channel
    norm: str  # sequence (Wanda's: root of the mean over sequences of the sum of squares) | rms (per token) | total
    # For channel and layer the tokens are looked at twice: inputs that were kept if there is room, else one more pass
    range: str  # the histogram spans: channel (each channel's own range) | layer (all channels') | fixed (+- limit)
    limit: float  # the bound of a fixed range, in units of the activations

    def __post_init__(self) -> None:
        if self.norm not in (known := ("sequence", "rms", "total")):
            raise Mistake(f"metric.norm must be one of {', '.join(known)}, got {self.norm!r}")
        _check(base=self.base, range=self.range, bins=self.bins)
        bounds.check("metric", self, not_negative=("alpha",), positive=("limit",))

    def collects(self) -> dict[str, Factory]:
        return _statistics(self.bins, self.range, self.limit)

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        # xi_cj = |w_cj| * (IR_c + alpha * ||x_c||)
        channel_I = stats["entropy"].entropy_I() + self.alpha * stats["norm"].norm_I(self.norm)
        return _size(weight_OI, self.base) * channel_I


def _check(*, base: str, range: str, bins: int) -> None:
    for setting, value, known in (
        ("base", base, ("magnitude", "ria", "nowag")),
        ("range", range, ("channel", "layer", "fixed")),
    ):
        if value not in known:
            raise Mistake(f"metric.{setting} must be one of {', '.join(known)}, got {value!r}")
    if not 2 <= bins <= MOST_BINS:
        raise Mistake(
            f"metric.bins must be at least 2, since one bin has no entropy, and at most {MOST_BINS}; got {bins}"
        )


def _statistics(bins: int, range: str, limit: float) -> dict[str, Factory]:
    from esparse.stats import ColumnEntropy, ColumnNorm

    return {"norm": ColumnNorm, "entropy": partial(ColumnEntropy, bins=bins, range=range, limit=limit)}


def _size(weight_OI: Tensor, base: str) -> Tensor:
    if base == "ria":
        return relative_importance(weight_OI)
    return (normalised(weight_OI) if base == "nowag" else weight_OI).abs()
