"""Shuffles: the order of the input channels in which a pattern's groups are cut.

A shuffle is a grouping: it decides which m channels compete with each other, and the keep mask is written back in the
channels' own order. Quality is therefore measured on the ordinary model; only what runs on sparse hardware needs the
order made physical. All layers that read the same tensor share one order: their score rows are stacked.

Shapes: O outputs (rows of all layers that share the order), I inputs. `order_I[k]` is the channel at place k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern


@dataclass(kw_only=True, slots=True)
class Shuffle(ABC):
    """A way to choose the channels of each group from the scores."""

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError where the settings make no sense for this pattern; called before anything runs."""
        return None

    @abstractmethod
    def order(self, scores_OI: Tensor, pattern: Pattern) -> Tensor | None:
        """The channel at each place (int64), or None for the channels' own order.

        Within a group the channels ascend, so that of equal scores the lowest channel survives as without a shuffle.
        The channels of a tail that m does not divide stay where they are.
        """


@dataclass(kw_only=True, slots=True)
class NoShuffle(Shuffle):
    """The channels' own order."""

    def order(self, scores_OI: Tensor, pattern: Pattern) -> None:
        return None
