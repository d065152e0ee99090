"""The global naive shuffle of E-Sparse (arXiv 2310.15929): spreads channels of similar mean score over all groups.

Shapes: O outputs, I inputs, G groups, M channels of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.shuffles import Layers, Shuffle

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import NM, Pattern


@dataclass(kw_only=True, slots=True)
class Gns(Shuffle):
    """Assigns the channels, sorted by mean score, to the groups in turn."""

    deal: str  # straight (every round begins at the first group) | serpentine (every second one at the last)

    def __post_init__(self) -> None:
        check_deal(self.deal)

    def order(self, scores_OI: Tensor, pattern: Pattern, layers: Layers | None = None) -> Tensor | None:
        nm = pattern.shuffled_groups(scores_OI.shape[1])
        return None if nm is None else dealt(scores_OI, nm, deal=self.deal)


def check_deal(deal: str) -> None:
    """Raises Mistake for an unknown deal."""
    if deal not in ("straight", "serpentine"):
        raise Mistake(f"shuffle.deal must be 'straight' or 'serpentine', got {deal!r}")


def dealt(scores_OI: Tensor, pattern: NM, *, deal: str) -> Tensor:
    """The order after the deal; the scores have at least one whole group."""
    import torch

    inputs = scores_OI.shape[1]
    whole = pattern.grouped_inputs(inputs)
    # float64, so that the sort does not depend on a device's order of summation.
    mean_I = scores_OI[:, :whole].mean(dim=0, dtype=torch.float64)
    rounds_MG = mean_I.argsort(descending=True, stable=True).unflatten(0, (pattern.m, -1))
    # The paper does not say which deal it means. The straight deal favours the first groups in every round; the
    # serpentine deal, used by RIA's code (OpenReview Tr0lPx9woF), evens this out.
    if deal == "serpentine":
        rounds_MG[1::2] = rounds_MG[1::2].flip(1)
    tail = torch.arange(whole, inputs, device=scores_OI.device)
    return torch.cat([rounds_MG.T.sort(dim=-1).values.flatten(), tail])
