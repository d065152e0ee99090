"""ADMM pruning (Boza 2024, arXiv 2401.02938): finds weights and mask together with a gradual schedule, for any n:m.

The input's channels are first scaled to norm 1. Each iteration projects W + U onto a mask that prunes more and more
weights, and solves for weights near the projection that reproduce the layer's output.
Shapes: O outputs, I inputs. Polarity: True in `keep` means the weight is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.parts import bounds
from esparse.updates import Layer, Solution, Update

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Grouping
    from esparse.stats import Factory

MASKS = ("start", "own")


@dataclass(kw_only=True, slots=True)
class Admm(Update):
    """Boza's iteration; with mask=start it finds only the weights."""

    mask: str  # own (found by the iteration) | start (as the metric, or the update before, chose it)
    damp: float  # added to the diagonal of the scaled Gram matrix, which is 1; it also holds W to the dense weights
    penalty: float  # rho, at the beginning
    iterations: int  # how many
    prune_iterations: int  # the first iterations, in which the mask shrinks

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise Mistake(f"update.mask must be one of {', '.join(MASKS)}, got {self.mask!r}")
        bounds.check("update", self, not_negative=("damp",), positive=("penalty",))
        if not 0 < self.prune_iterations <= self.iterations:
            raise Mistake(
                f"update.prune_iterations must lie between 1 and update.iterations={self.iterations}, "
                f"got {self.prune_iterations}"
            )

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram}

    def apply(self, layer: Layer, start: Solution) -> Solution:
        import torch

        from esparse.linalg import inverse, scaled

        gram_II, norm_I = scaled(layer.stats["gram"].gram_II)
        gram_II = gram_II + self.damp * torch.eye(len(gram_II), device=gram_II.device, dtype=torch.float32)
        dense_OI = layer.dense_OI * norm_I
        target_OI = dense_OI @ gram_II
        inverse_II = inverse(
            gram_II + self.penalty * torch.eye(len(gram_II), device=gram_II.device, dtype=torch.float32)
        )
        weight_OI, dual_OI = dense_OI, torch.zeros_like(dense_OI)
        keep_OI = start.keep_OI
        for step in range(self.iterations):
            sum_OI = weight_OI + dual_OI
            if self.mask == "own" and step < self.prune_iterations:
                share = 1 - (1 - (step + 1) / self.prune_iterations) ** 3
                keep_OI = gradual_keep(sum_OI.abs(), layer.grouping, share)
            split_OI = sum_OI * keep_OI
            dual_OI = dual_OI + weight_OI - split_OI
            weight_OI = (target_OI + self.penalty * (split_OI - dual_OI)) @ inverse_II
        final_OI = (weight_OI + dual_OI) * keep_OI
        return Solution(final_OI / norm_I, keep_OI)


def gradual_keep(scores_OI: Tensor, grouping: Grouping, share: float) -> Tensor:
    """The pattern's mask, but with only the `share` of its pruned weights that have the lowest scores pruned yet."""
    import torch

    keep_OI = grouping.keep_top(scores_OI)
    if share >= 1:
        return keep_OI
    pruned_P = scores_OI[~keep_OI]
    going = int(share * pruned_P.numel())
    if going == 0:
        return torch.ones_like(keep_OI)
    return keep_OI | (scores_OI > pruned_P.kthvalue(going).values)
