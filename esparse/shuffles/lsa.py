"""RIA's channel permutation (Zhang et al., ICLR 2024, OpenReview Tr0lPx9woF): assigns channels slot by slot.

Each group has m slots. For one slot after the other, all groups give up their channel in it, and a linear assignment
problem redistributes these channels so that the total kept score is greatest. RIA's code finds an order for every
layer; here, as with all shuffles, layers that read one tensor (q, k, v; gate, up) share an order.
Shapes: O outputs, I inputs, G groups, M slots of a group, R = O rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.shuffles import Search
from esparse.shuffles.gns import check_deal, dealt

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import NM, Pattern


@dataclass(kw_only=True, slots=True)
class Lsa(Search):
    """The global deal (as in `Gns`), then `rounds` passes of assignments over all slots.

    Assignments are not bound to blocks: `block` is for the search that `objective=error` adds.
    """

    deal: str  # straight | serpentine (as the published code deals)
    rounds: int  # passes over all slots, at most; a pass that gains nothing is the last

    def __post_init__(self) -> None:
        Search.__post_init__(self)
        check_deal(self.deal)  # an unknown deal should fail before a job is submitted
        _check_rounds(self.rounds)

    def check(self, pattern: Pattern) -> None:
        self.check_foldable()
        if self.objective == "error":
            Search.check(self, pattern)

    def by_score(self, scores_OI: Tensor, pattern: NM) -> Tensor:
        from esparse.shuffles.slot_assignment import assign_slots

        order_I = dealt(scores_OI, pattern, deal=self.deal)
        for _ in range(self.rounds):
            better_I = assign_slots(scores_OI, order_I, n=pattern.n, m=pattern.m)
            if bool((better_I == order_I).all()):
                break
            order_I = better_I
        return order_I


@dataclass(kw_only=True, slots=True)
class Alternating(Search):
    """Alternates assignments and swaps until neither gains, starting from the own order and from a global deal.

    Takes the better of both results: the greedy search from the dealt order alone sometimes ended lower.
    """

    deal: str  # straight (every round begins at the first group) | serpentine (every second one at the last)
    rounds: int  # of assignments and swaps, at most

    def __post_init__(self) -> None:
        Search.__post_init__(self)
        check_deal(self.deal)
        _check_rounds(self.rounds)

    def by_score(self, scores_OI: Tensor, pattern: NM) -> Tensor:
        import torch

        own_I = torch.arange(scores_OI.shape[1], device=scores_OI.device)
        starts = (own_I, dealt(scores_OI, pattern, deal=self.deal))
        ends = [self._improved(start_I, scores_OI, pattern) for start_I in starts]
        return max(ends, key=lambda order_I: kept_score(scores_OI, order_I, pattern))

    def _improved(self, order_I: Tensor, scores_OI: Tensor, pattern: NM) -> Tensor:
        from esparse.shuffles.score_swaps import swap_in_blocks
        from esparse.shuffles.slot_assignment import assign_slots

        kept = kept_score(scores_OI, order_I, pattern)
        for _ in range(self.rounds):
            swapped_I = swap_in_blocks(scores_OI, order_I, n=pattern.n, m=pattern.m, block=self.block)
            better_I = assign_slots(scores_OI, swapped_I, n=pattern.n, m=pattern.m)
            now = kept_score(scores_OI, better_I, pattern)
            if now <= kept * (1 + 1e-6):  # float32 scores have no more digits
                break
            order_I, kept = better_I, now
        return order_I


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise Mistake(f"shuffle.rounds must be at least 1, got {rounds}")


def kept_score(scores_OI: Tensor, order_I: Tensor, pattern: NM) -> float:
    """The total kept score if groups are cut in this order."""
    import torch

    ordered_OI = scores_OI[:, order_I]
    return float(ordered_OI[pattern.keep_top(ordered_OI)].sum(dtype=torch.float64))
