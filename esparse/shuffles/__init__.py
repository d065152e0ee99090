"""Shuffles: the order of the input channels in which a pattern's groups are cut.

A shuffle is a grouping: it decides which m channels compete, and the keep mask is then written back in the channels'
own order. Quality is therefore measured on the ordinary model; only sparse hardware needs the order made physical. All
layers that read the same tensor share one order: their score rows are stacked.

Shapes: O outputs (rows of all layers that share the order), I inputs. `order_I[k]` is the channel at place k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import NM, Pattern
    from esparse.stats import Factory

OBJECTIVES = ("score", "error")


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """The layers that share an order: their dense weights (rows stacked like the scores) and their input's Gram matrix.

    Both are float32; G = X^T X is I x I.
    """

    dense_OI: Tensor
    gram_II: Tensor


@dataclass(kw_only=True, slots=True)
class Shuffle(ABC):
    """Base class of shuffles: chooses the channels of each group from the scores."""

    foldable: bool = False  # only orders that the layers before absorb: down_proj's, and o_proj's within its heads

    def collects(self) -> dict[str, Factory]:
        """The input statistics that `order` needs in `layers`, by name; default: none."""
        return {}

    def check(self, pattern: Pattern) -> None:
        """Raises Mistake if the settings do not fit this pattern; called before anything runs."""
        return None

    @abstractmethod
    def order(self, scores_OI: Tensor, pattern: Pattern, layers: Layers | None = None) -> Tensor | None:
        """The channel at each place (int64), or None for the channels' own order.

        Channels ascend within a group, so that of equal scores the lowest channel is kept, as without a shuffle. If m
        does not divide the width, the last channels (the tail) stay in place. `layers` is None if `collects` is empty
        or no token reached the layers.
        """

    def folded_order(self, scores_OI: Tensor, pattern: Pattern, runs_BRD: Tensor) -> Tensor:
        """The order among those that keep each set of runs together: `runs_BRD[b]` (R x D channels) takes one order.

        As `order`, which sees the runs of a set as rows of one matrix; sets whose width the groups do not divide keep
        their channels' own order, as groups must not reach from one set into the next.
        """
        import torch

        order_I = torch.arange(scores_OI.shape[1], device=scores_OI.device)
        for runs_RD in runs_BRD.to(scores_OI.device):
            runs, width = runs_RD.shape
            nm = pattern.shuffled_groups(width)
            if nm is None or (len(runs_BRD) * runs > 1 and width % nm.m):
                continue
            stacked_OD = scores_OI[:, runs_RD.flatten()].view(-1, runs, width).flatten(0, 1)
            own_D = self.order(stacked_OD, pattern)
            if own_D is not None:
                order_I[runs_RD] = runs_RD[:, own_D]
        return order_I


@dataclass(kw_only=True, slots=True)
class NoShuffle(Shuffle):
    """The channels' own order."""

    def order(self, scores_OI: Tensor, pattern: Pattern, layers: Layers | None = None) -> None:
        return None


@dataclass(kw_only=True, slots=True)
class Search(Shuffle):
    """A shuffle that raises the kept score; with `objective=error` a search then lowers the layers' true error.

    With both objectives the scores choose which weights of a group are kept. The search does not take account of
    outliers that a pattern keeps beside its groups.
    """

    # With error, swaps go on from the order by score that lower the error; if no token came, the score alone decides
    objective: str  # score (the kept score alone) | error (then the layers' error on the calibration tokens)
    block: int  # channels of a block within which swaps are tried; rounded down to whole groups

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise Mistake(f"shuffle.objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram} if self.objective == "error" else {}

    def check(self, pattern: Pattern) -> None:
        self.check_foldable()
        m = pattern.swap_width
        if m is not None and self.block < 2 * m:
            raise Mistake(
                f"shuffle.block={self.block} holds fewer than two groups of {m}, so no channels could be "
                f"swapped: use at least {2 * m}"
            )

    def order(self, scores_OI: Tensor, pattern: Pattern, layers: Layers | None = None) -> Tensor | None:
        nm = pattern.shuffled_groups(scores_OI.shape[1])
        if nm is None:
            return None
        order_I = self.by_score(scores_OI, nm)
        if self.objective == "score" or layers is None:
            return order_I
        from esparse.shuffles.error_swaps import swap_by_error

        return swap_by_error(scores_OI, layers.dense_OI, layers.gram_II, order_I, n=nm.n, m=nm.m, block=self.block)

    def check_foldable(self) -> None:
        """Raises ValueError for an objective that needs more than scores, where orders are restricted."""
        if self.foldable and self.objective == "error":
            raise Mistake(
                "shuffle.foldable=true gives several heads one order, which shuffle.objective=error does not foresee: "
                "use shuffle.objective=score"
            )

    @abstractmethod
    def by_score(self, scores_OI: Tensor, pattern: NM) -> Tensor:
        """The order that raises the kept score; the scores have at least one whole group."""
