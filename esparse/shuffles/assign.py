"""Slot-wise assignment of channels to groups: the search under RIA's channel permutation.

Leave out slot k of a group: the n-th largest of the others is b, and with the value x in the slot the group keeps
max(b, x) beside what does not depend on x. So the gain of giving channel c to group g is sum_r max(b_g[r], x_c[r]), and
the best exchange of all groups' channels of one slot is a linear assignment problem.
Shapes: O outputs, I inputs, G groups, M slots of a group, R = O rows.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TILE = 2**24  # values of the maxima held at a time


def assign_slots(scores_OI: Tensor, order_I: Tensor, *, n: int, m: int) -> Tensor:
    """The order after one pass over all slots; it never keeps less, and without a gain it is the order given.

    Channels ascend within each group; those behind the last whole group stay in place.
    """
    whole = len(order_I) - len(order_I) % m
    channels_GM = order_I[:whole].unflatten(0, (-1, m)).clone()
    columns_IR = scores_OI.detach().T.contiguous().float()
    for slot in range(m):
        channels_GM[:, slot] = _assigned(columns_IR, channels_GM, slot, n)
    return torch.cat([channels_GM.sort(dim=-1).values.flatten(), order_I[whole:]])


def _assigned(columns_IR: Tensor, channels_GM: Tensor, slot: int, n: int) -> Tensor:
    """Which of the slot's channels each group gets (G values)."""
    others = [k for k in range(channels_GM.shape[1]) if k != slot]
    threshold_GR = columns_IR[channels_GM[:, others]].topk(n, dim=1).values[:, -1]
    handed_GR = columns_IR[channels_GM[:, slot]]
    worth_GG = summed_maxima(threshold_GR, handed_GR)
    groups, gets = linear_sum_assignment(worth_GG.cpu().numpy(), maximize=True)
    staying = float(worth_GG.diagonal().sum())
    moving = float(worth_GG[groups, gets].sum())
    if moving <= staying * (1 + 1e-9):  # equal assignments leave the channels where they are
        return channels_GM[:, slot]
    return channels_GM[torch.as_tensor(gets, device=channels_GM.device), slot]


def summed_maxima(left_GR: Tensor, right_GR: Tensor) -> Tensor:
    """sum_r max(left[g, r], right[c, r]) for all pairs (G x G, float64)."""
    step = max(1, TILE // right_GR.numel())
    return torch.cat(
        [
            torch.maximum(part_GR[:, None], right_GR[None]).sum(-1, dtype=torch.float64)
            for part_GR in left_GR.split(step)
        ]
    )
