"""Swaps channels to lower the layers' true error: the search of `objective=error`.

The scores still choose which weights of a group are kept; the search only chooses which channels form a group. Let D be
the pruned part of the dense weights, with one row d per output, and G the Gram matrix of the input. The search lowers
the squared error on the calibration tokens, E = sum_d d G d^T. The method and its formulas are our own.

Every sweep is a tournament between the groups of a block, in which any two meet once. In each round every pair proposes
the best of its m^2 swaps (error_changes.py). From the best proposal on, proposals are carried out as long as their
exact joint change lowers E.

Shapes: O outputs (rows of all layers that share the order), I inputs; C channels of a block, R = O rows, G groups of a
block, M channels of a group, P pairs of groups, K proposed swaps, X = K * 2 * M channels of their groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from esparse.parallel.cores import each_core
from esparse.patterns import NM, Grouping
from esparse.shuffles.error_changes import ChannelBlock, lost
from esparse.shuffles.score_swaps import block_width

SWEEPS = 50  # at most; no layer of the built-in model needed more than 15
# A sweep that gains less than this share of the error is the last one. In wide layers, going on until no swap gains
# took twice as long and lowered the error by only another half per cent; in narrow layers the end comes soon anyway.
ENOUGH = 1e-3
# A swap must lower the error by more than this part of an average group's share of it; less is float32's noise.
TOLERANCE = 1e-5


def swap_by_error(
    scores_OI: Tensor, dense_OI: Tensor, gram_II: Tensor, start_I: Tensor, *, n: int, m: int, block: int
) -> Tensor:
    """The order after the swaps; its error is never above that of the start order.

    Cuts blocks and writes groups like `swap_in_blocks`.
    """
    scores_OI, dense_OI = scores_OI.detach(), dense_OI.detach()
    width, whole = block_width(block, m), len(start_I) - len(start_I) % m
    rank_OI, order_I = ranks(scores_OI), start_I.clone()
    lost_OI = dense_OI.masked_fill(Grouping(NM(n, m), start_I).keep_top(scores_OI), 0.0)
    before = squared_error(lost_OI, gram_II)
    worth = TOLERANCE * before * m / len(start_I)
    with each_core() as pool:
        for _ in range(SWEEPS):
            gained = 0.0
            for places_C in order_I[:whole].split(width):  # views; the new order is written into them
                channels_C = places_C.clone()
                part = block_of(channels_C, rank_OI, dense_OI, lost_OI, gram_II, n=n, m=m)
                gained += tournament(part, worth, pool)
                places_C.copy_(channels_C[part.groups_GM].sort(dim=-1).values.flatten())
                lost_OI[:, channels_C] = part.lost_CR.T
            if gained <= ENOUGH * before:
                break
    return order_I if squared_error(lost_OI, gram_II) < before else start_I


def squared_error(lost_OI: Tensor, gram_II: Tensor) -> float:
    """sum_d d G d^T over the rows d."""
    return float((lost_OI * (lost_OI @ gram_II)).sum(dtype=torch.float64))


def ranks(scores_OI: Tensor) -> Tensor:
    """The rank of each channel in its row (int32): 0 for the highest score, ties to the lowest channel."""
    place_I = torch.arange(scores_OI.shape[1], dtype=torch.int32, device=scores_OI.device)
    by_score_OI = scores_OI.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(by_score_OI, dtype=torch.int32).scatter_(1, by_score_OI, place_I.expand_as(by_score_OI))


def block_of(
    channels_C: Tensor, rank_OI: Tensor, dense_OI: Tensor, lost_OI: Tensor, gram_II: Tensor, *, n: int, m: int
) -> ChannelBlock:
    """The block of these channels in groups of m, with the slope of the whole layer's error."""
    return ChannelBlock.begin(
        rank_CR=rank_OI[:, channels_C].T.float().contiguous(),
        dense_CR=dense_OI[:, channels_C].T.contiguous(),
        slope_CR=2 * (gram_II[channels_C] @ lost_OI.T),
        gram_CC=gram_II[channels_C][:, channels_C],
        n=n,
        m=m,
    )


def tournament(block: ChannelBlock, worth: float, pool: ThreadPoolExecutor) -> float:
    """Lets all pairs of the block's groups meet once; returns the gain, by how much the error has fallen."""
    gained = 0.0
    for left_P, right_P in rounds(len(block.groups_GM), block.groups_GM.device):
        change_P, swap_P = block.changes(left_P, right_P, pool).flatten(1).min(dim=1)
        some_P = change_P < -worth
        if some_P.any():
            groups_K2 = torch.stack([left_P, right_P], dim=1)[some_P]
            channels_K2M = _swapped(block.groups_GM[groups_K2], swap_P[some_P])
            taken, change = together(block, channels_K2M, worth)
            if taken:
                block.regroup(groups_K2[taken].flatten(), channels_K2M[taken].flatten(0, 1))
            gained -= change
    return gained


def rounds(groups: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Rounds of pairs of groups until any two have met once; each round has all groups, but one if they are odd."""
    players = groups + groups % 2  # if the number is odd, the last player does not exist
    step_P = torch.arange(players // 2, device=device)
    for turn in range(players - 1):
        left_P, right_P = (turn + step_P) % (players - 1), (turn - step_P) % (players - 1)
        right_P[0] = players - 1  # the others rotate around it
        here_P = right_P < groups
        yield left_P[here_P], right_P[here_P]


def _swapped(channels_K2M: Tensor, swap_K: Tensor) -> Tensor:
    """The channels of two groups after swap number `swap_K` of their m^2 swaps."""
    m = channels_K2M.shape[2]
    places_K2 = torch.stack([swap_K // m, swap_K % m], dim=1)[..., None]
    return channels_K2M.scatter(2, places_K2, channels_K2M.gather(2, places_K2).flip(1))


def together(block: ChannelBlock, channels_K2M: Tensor, worth: float) -> tuple[list[int], float]:
    """The indices of the proposals to carry out, the best first, and their joint change of the error."""
    where_X = channels_K2M.flatten()
    after_XR = lost(block.rank_CR, block.dense_CR, channels_K2M.flatten(0, 1), block.n).flatten(0, 1)
    change_XR = after_XR - block.lost_CR[where_X]
    alone_K = (change_XR * block.slope_CR[where_X]).sum(1, dtype=torch.float64).view(len(channels_K2M), -1).sum(1)
    bend_XX = (change_XR @ change_XR.T).double() * block.gram_CC[where_X[:, None], where_X]
    bend_KK = bend_XX.unflatten(0, (len(channels_K2M), -1)).unflatten(2, (len(channels_K2M), -1)).sum((1, 3)).cpu()
    alone_K = alone_K.cpu() + bend_KK.diagonal()
    taken: list[int] = []
    total = 0.0
    for k in alone_K.argsort(stable=True).tolist():
        change = float(alone_K[k] + 2 * bend_KK[k, taken].sum())
        if change < -worth:
            taken.append(k)
            total += change
    return taken, total
