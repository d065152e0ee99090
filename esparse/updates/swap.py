"""1-swap refinement: exchanges a kept and a pruned weight of a group if that lowers the true layer error.

Let D = W_dense - W, let d be a row of D, G the Gram matrix of the input and v = d G. Pruning the kept weight p and
keeping q with the value x instead changes d G d^T by

    2 w_p v_p + w_p^2 G_pp - 2 x v_q + x^2 G_qq - 2 w_p x G_pq,

which is least for x = (v_q + w_p G_pq) / G_qq. The idea is from SparseSwaps (Zimmer et al. 2025); the formula is our
own derivation. Shapes: O outputs, I inputs, K groups, M = m weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.parts import bounds
from esparse.updates import Layer, Solution, Update

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.stats import Factory

VALUES = ("dense", "best")


@dataclass(kw_only=True, slots=True)
class Swap(Update):
    """Makes the best swap of every row, repeatedly, until no swap lowers the row's error."""

    values: str  # of a weight that comes back: dense (its own) | best (what lowers the error most)
    # It grows if the matrix is singular, and the log says so
    damp: float  # added to the Gram matrix's diagonal, as a share of its mean
    steps: int  # most swaps per row

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise Mistake(f"update.values must be one of {', '.join(VALUES)}, got {self.values!r}")
        bounds.check("update", self, not_negative=("damp", "steps"))

    def check(self, pattern: Pattern) -> None:
        if pattern.swap_width is None:
            raise Mistake(f"update=swap exchanges weights within groups: it needs an n:m pattern, not {pattern}")

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram}

    def apply(self, layer: Layer, start: Solution) -> Solution:
        from esparse.linalg import damped

        grouping = layer.grouping
        self.check(grouping.pattern)
        assert grouping.pattern.swap_width
        gram_II = damped(layer.stats["gram"].gram_II, self.damp)
        order_I = grouping.order_I
        weight_OI, keep_OI = refine(
            grouping.ordered(layer.dense_OI),
            grouping.ordered(start.weight_OI),
            grouping.ordered(start.keep_OI),
            gram_II if order_I is None else gram_II[order_I][:, order_I],
            m=grouping.pattern.swap_width,
            values=self.values,
            steps=self.steps,
        )
        return Solution(grouping.restored(weight_OI), grouping.restored(keep_OI))


def refine(
    dense_OI: Tensor, weight_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, *, m: int, values: str, steps: int
) -> tuple[Tensor, Tensor]:
    """Weights and mask after the swaps, with columns in group order; a tail shorter than m is not changed."""
    import torch

    weight_OI, keep_OI = weight_OI.clone(), keep_OI.clone()
    outputs, inputs = weight_OI.shape
    whole = inputs - inputs % m
    blocks_KMM = (
        gram_II[:whole, :whole].unflatten(0, (-1, m)).unflatten(2, (-1, m)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    )
    diagonal_I = gram_II.diagonal()
    pull_OI = (dense_OI - weight_OI) @ gram_II  # v, kept up to date
    rows_R = torch.arange(outputs, device=weight_OI.device)  # rows that may still gain
    for _ in range(steps if whole else 0):  # a layer narrower than m has no group to swap in
        gain_RKMM, value_RKMM = _gains(
            dense_OI[rows_R, :whole].unflatten(1, (-1, m)),
            weight_OI[rows_R, :whole].unflatten(1, (-1, m)),
            keep_OI[rows_R, :whole].unflatten(1, (-1, m)),
            pull_OI[rows_R, :whole].unflatten(1, (-1, m)),
            blocks_KMM,
            values,
        )
        change_R, where_R = gain_RKMM.flatten(1).min(dim=1)
        # In float32 a change below a millionth of the row's scale may be noise, and a swap and its reverse could
        # alternate for ever.
        scale_R = (weight_OI[rows_R].square() * diagonal_I).sum(1)
        worth_R = change_R < -1e-6 * scale_R
        if not worth_R.any():
            break
        value_R = value_RKMM.flatten(1).gather(1, where_R[:, None]).squeeze(1)[worth_R]
        rows_R, where_R = rows_R[worth_R], where_R[worth_R]
        group_R, pair_R = where_R // (m * m), where_R % (m * m)
        out_R, in_R = group_R * m + pair_R // m, group_R * m + pair_R % m
        lost_R = weight_OI[rows_R, out_R]
        pull_OI[rows_R] += lost_R[:, None] * gram_II[out_R] - value_R[:, None] * gram_II[in_R]
        weight_OI[rows_R, out_R], keep_OI[rows_R, out_R] = 0.0, False
        weight_OI[rows_R, in_R], keep_OI[rows_R, in_R] = value_R, True
    return weight_OI, keep_OI


def _gains(
    dense_RKM: Tensor, weight_RKM: Tensor, keep_RKM: Tensor, pull_RKM: Tensor, blocks_KMM: Tensor, values: str
) -> tuple[Tensor, Tensor]:
    """The change of the row's error by each swap (kept p, pruned q) of each group, and the value of q after it."""
    diagonal_KM = blocks_KMM.diagonal(dim1=1, dim2=2)
    out_RKM = 2 * weight_RKM * pull_RKM + weight_RKM.square() * diagonal_KM
    toward_RKMM = pull_RKM[..., None, :] + weight_RKM[..., :, None] * blocks_KMM  # v_q + w_p G_pq
    if values == "best":
        value_RKMM = toward_RKMM / diagonal_KM[:, None, :]
    else:
        value_RKMM = dense_RKM[..., None, :].expand_as(toward_RKMM)
    change_RKMM = out_RKM[..., :, None] + value_RKMM * (value_RKMM * diagonal_KM[:, None, :] - 2 * toward_RKMM)
    allowed_RKMM = keep_RKM[..., :, None] & ~keep_RKM[..., None, :]
    return change_RKMM.masked_fill(~allowed_RKMM, float("inf")), value_RKMM
