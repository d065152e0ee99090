"""The local block shuffle of E-Sparse (arXiv 2310.15929), and its full shuffle: the global deal, then local swaps.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.shuffles import Search
from esparse.shuffles.gns import check_deal, dealt

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import NM


@dataclass(kw_only=True, slots=True)
class Lbs(Search):
    """Swaps channels between the groups of a block until no swap raises the total kept score."""

    def by_score(self, scores_OI: Tensor, pattern: NM) -> Tensor:
        import torch

        from esparse.shuffles.score_swaps import swap_in_blocks

        own_I = torch.arange(scores_OI.shape[1], device=scores_OI.device)
        return swap_in_blocks(scores_OI, own_I, n=pattern.n, m=pattern.m, block=self.block)


@dataclass(kw_only=True, slots=True)
class Esparse(Search):
    """`Gns`, then `Lbs` in blocks of the order that results."""

    deal: str  # straight (every round begins at the first group) | serpentine (every second one at the last)

    def __post_init__(self) -> None:
        Search.__post_init__(self)
        check_deal(self.deal)  # here, so that it fails before a job is submitted

    def by_score(self, scores_OI: Tensor, pattern: NM) -> Tensor:
        from esparse.shuffles.score_swaps import swap_in_blocks

        dealt_I = dealt(scores_OI, pattern, deal=self.deal)
        return swap_in_blocks(scores_OI, dealt_I, n=pattern.n, m=pattern.m, block=self.block)
