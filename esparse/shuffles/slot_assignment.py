"""Slot-wise assignment of channels to groups: the search of RIA's channel permutation.

Leave out slot k of a group: the n-th largest of the others is b, and with the value x in the slot the group keeps
max(b, x) and scores that do not depend on x. So giving channel c to group g is worth sum_r max(b_g[r], x_c[r]), and the
best exchange of all groups' channels in one slot is a linear assignment problem.
Shapes: O outputs, I inputs, G groups, M slots of a group, R = O rows.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from esparse import kernels
from esparse.shuffles.score_swaps import TOLERANCE, largest, summed_maxima


def assign_slots(scores_OI: Tensor, order_I: Tensor, *, n: int, m: int) -> Tensor:
    """The order after one pass over all slots; its kept score never falls, and without a gain the order stays the same.

    Channels ascend within each group; channels after the last whole group stay in place.
    """
    whole = len(order_I) - len(order_I) % m
    channels_GM = order_I[:whole].unflatten(0, (-1, m)).clone()
    scores_RI = scores_OI.detach().float()
    columns_IR = scores_RI.T.contiguous()
    for slot in range(m):
        channels_GM[:, slot] = _assigned(scores_RI, columns_IR, channels_GM, slot, n)
    return torch.cat([channels_GM.sort(dim=-1).values.flatten(), order_I[whole:]])


def _assigned(scores_RI: Tensor, columns_IR: Tensor, channels_GM: Tensor, slot: int, n: int) -> Tensor:
    """The channel of the slot that each group gets (G values)."""
    others = [k for k in range(channels_GM.shape[1]) if k != slot]
    threshold_GR = largest(columns_IR[channels_GM[:, others]], n)[-1]
    handed_RG = scores_RI[:, channels_GM[:, slot]]
    worth_GG = _worth(threshold_GR, handed_RG)
    groups, gets = linear_sum_assignment(worth_GG.cpu().numpy(), maximize=True)
    staying = float(worth_GG.diagonal().sum())
    moving = float(worth_GG[groups, gets].sum())
    if moving <= staying * (1 + TOLERANCE):  # assignments without a gain change nothing
        return channels_GM[:, slot]
    return channels_GM[torch.as_tensor(gets, device=channels_GM.device), slot]


def _worth(threshold_GR: Tensor, handed_RG: Tensor) -> Tensor:
    """sum_r max(b_g[r], x_c[r]) for each group g and each of the slot's channels c (G x G, float64)."""
    exchange = kernels.triton("exchange", threshold_GR.device)
    if exchange is None:
        return summed_maxima(threshold_GR[:, None], torch.ones_like(threshold_GR)[:, None, None], handed_RG)[:, 0]
    block_G = torch.zeros(len(threshold_GR), dtype=torch.int64, device=threshold_GR.device)
    return exchange.summed_maxima(threshold_GR[..., None], handed_RG.contiguous()[None], block_G, exchange.HELD)[:, 0]
