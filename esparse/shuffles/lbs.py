"""The local block shuffle of E-Sparse (arXiv 2310.15929), and its whole shuffle: the global deal, then the local swaps.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.patterns import NM
from esparse.shuffles import Shuffle
from esparse.shuffles.gns import Gns

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern


@dataclass(kw_only=True, slots=True)
class Lbs(Shuffle):
    """Channels of different groups of a block are swapped until no swap raises the total kept score."""

    block: int  # channels; rounded down to whole groups

    def check(self, pattern: Pattern) -> None:
        if isinstance(pattern, NM) and self.block < 2 * pattern.m:
            raise ValueError(
                f"shuffle.block={self.block} holds fewer than two groups of {pattern.m}, between which channels could "
                f"be swapped: use at least {2 * pattern.m}"
            )

    def order(self, scores_OI: Tensor, pattern: Pattern) -> Tensor | None:
        import torch

        return self.refined(torch.arange(scores_OI.shape[1], device=scores_OI.device), scores_OI, pattern)

    def refined(self, start_I: Tensor, scores_OI: Tensor, pattern: Pattern) -> Tensor | None:
        """The order after the swaps, where the blocks are cut from the start order; None where there are no groups."""
        if not isinstance(pattern, NM) or not pattern.grouped_inputs(scores_OI.shape[1]):
            return None
        from esparse.shuffles.swap import swap_in_blocks

        return swap_in_blocks(scores_OI, start_I, n=pattern.n, m=pattern.m, block=self.block)


@dataclass(kw_only=True, slots=True)
class Esparse(Shuffle):
    """`Gns`, then `Lbs` in blocks of the order that it dealt."""

    deal: str  # as in `Gns`
    block: int  # as in `Lbs`

    def __post_init__(self) -> None:
        Gns(deal=self.deal)  # an unknown deal should fail before a job is submitted

    def check(self, pattern: Pattern) -> None:
        Lbs(block=self.block).check(pattern)

    def order(self, scores_OI: Tensor, pattern: Pattern) -> Tensor | None:
        dealt_I = Gns(deal=self.deal).order(scores_OI, pattern)
        return None if dealt_I is None else Lbs(block=self.block).refined(dealt_I, scores_OI, pattern)
