"""Computes how swaps of two channels change the layers' true error, for all swaps between pairs of groups at once.

D is the pruned part of the dense weights w, G the Gram matrix of the input, and E = sum_d d G d^T over the rows d of D;
so its slope in D is S = 2 D G, and a change c of a row changes E by c.s + c G c^T.

Swap channel p of group A with channel q of group B. In one row this can change only four channels: p, q and one edge of
each group. Leave p out of A: the n-th best of the others is the edge a, which a new channel must beat to be kept. It is
A's first pruned channel if p was kept, and its last kept one if p was not. Likewise for q and the edge b of B. Let x,
y, u, t in {0, 1} say that p was kept, that q was kept, that q beats a, and that p beats b. Then D changes by

    p: w_p (x - t),    q: w_q (y - u),    a: w_a (u - x),    b: w_b (t - y),

exactly, for every n:m. The formulas and the method are our own.

Shapes: C channels of a block, R rows, G groups of the block, M channels of a group, P pairs of groups, F fields of
`Side`; a 2 stands for last kept, first pruned. Of M x M the first is p's place in its group, the second q's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Values per operation: on a CPU 256 KiB per operand, so that operands stay in a core's cache.
CPU_TILE, GPU_TILE = 2**16, 2**24


class Side(NamedTuple):
    """Facts about a group's channels, row by row; "edge" means the edge that belongs to the channel."""

    keep: Tensor  # 1 where the channel is kept, else 0
    rank: Tensor
    weight: Tensor
    edge_rank: Tensor
    edge_pull: Tensor  # 2 G_pa w_a
    edge_bend: Tensor  # G_aa w_a^2
    slope: Tensor
    edge_slope: Tensor  # s_a w_a


@dataclass(slots=True)
class ChannelBlock:
    """The groups of one block and their pruned weights; `rank_CR` and `dense_CR` are constant."""

    n: int
    rank_CR: Tensor  # the place of each channel in its row by score, 0 for the best, as float32
    dense_CR: Tensor
    lost_CR: Tensor  # D
    slope_CR: Tensor  # S; includes the pruned weights of other blocks
    gram_CC: Tensor
    groups_GM: Tensor  # channels of the block
    edges_G2MR: Tensor  # w at the edge's own place, else 0; the second is first pruned minus last kept
    sides_GMFR: Tensor  # as in `Side`

    @classmethod
    def begin(
        cls, rank_CR: Tensor, dense_CR: Tensor, slope_CR: Tensor, gram_CC: Tensor, *, n: int, m: int
    ) -> ChannelBlock:
        """A block whose groups are m consecutive channels."""
        channels, rows = rank_CR.shape
        groups_GM = torch.arange(channels, device=rank_CR.device).view(-1, m)
        edges_G2MR = dense_CR.new_empty(len(groups_GM), 2, m, rows)
        sides_GMFR = dense_CR.new_empty(len(groups_GM), m, len(Side._fields), rows)
        lost_CR = lost(rank_CR, dense_CR, groups_GM, n).flatten(0, 1)
        block = cls(n, rank_CR, dense_CR, lost_CR, slope_CR, gram_CC, groups_GM, edges_G2MR, sides_GMFR)
        block._describe(torch.arange(len(groups_GM), device=rank_CR.device))
        return block

    def regroup(self, groups_K: Tensor, channels_KM: Tensor) -> None:
        """Gives these groups other channels; all groups that lose or gain a channel must be among them."""
        lost_KMR = lost(self.rank_CR, self.dense_CR, channels_KM, self.n)
        where = channels_KM.flatten()
        change_XR = lost_KMR.flatten(0, 1) - self.lost_CR[where]
        self.slope_CR.addmm_(self.gram_CC[:, where], change_XR, alpha=2)
        self.lost_CR[where] = lost_KMR.flatten(0, 1)
        self.groups_GM[groups_K] = channels_KM
        self._describe(groups_K)

    def changes(self, left_P: Tensor, right_P: Tensor, pool: ThreadPoolExecutor) -> Tensor:
        """The change of the error by each swap between these pairs of groups (P x M x M, float64)."""
        m, rows = self.groups_GM.shape[1], self.rank_CR.shape[1]
        tile = CPU_TILE if self.rank_CR.device.type == "cpu" else GPU_TILE
        row_step = min(rows, max(1, tile // m**2))
        pair_step = max(1, tile // (m**2 * row_step))

        def of_pairs(left_P: Tensor, right_P: Tensor) -> Tensor:
            tiles = (slice(row, row + row_step) for row in range(0, rows, row_step))
            return torch.stack([self._changes(left_P, right_P, some) for some in tiles]).double().sum(0)

        return torch.cat(list(pool.map(of_pairs, left_P.split(pair_step), right_P.split(pair_step))))

    def _changes(self, left_P: Tensor, right_P: Tensor, rows: slice) -> Tensor:
        """`changes`, summed over some rows."""
        p, q = self._side(left_P, rows, 2), self._side(right_P, rows, 1)
        own_PCC = self.gram_CC.diagonal()[self.groups_GM]
        p_own, q_own = own_PCC[left_P][:, :, None, None], own_PCC[right_P][:, None, :, None]
        between_PMM = 2 * self.gram_CC[self.groups_GM[left_P][:, :, None], self.groups_GM[right_P][:, None]]
        a_P2MR, b_P2MR = (self.edges_G2MR[..., rows].index_select(0, some_P) for some_P in (left_P, right_P))
        a_on_q_P2MR = between_PMM.mT[:, None] @ a_P2MR
        b_on_p_P2MR = between_PMM[:, None] @ b_P2MR
        a_on_b_P22R = (a_on_q_P2MR[:, :, None] * b_P2MR[:, None]).sum(3)
        a_on_b_PM2R = _edge(a_on_b_P22R[:, None], 2, p.keep)

        # u and t; ranks are distinct integers.
        q_beats_a = (p.edge_rank - q.rank).clamp_(0, 1)
        p_beats_b = (q.edge_rank - p.rank).clamp_(0, 1)
        p_change = (p.keep - p_beats_b).mul_(p.weight)
        q_change = (q.keep - q_beats_a).mul_(q.weight)
        a_change, b_change = q_beats_a.sub_(p.keep), p_beats_b.sub_(q.keep)  # in units of w_a and w_b

        # For each channel its slope, its own second-order term, and the terms with channels that follow.
        rise = torch.addcmul(p.slope, p_own, p_change).addcmul_(between_PMM[..., None], q_change)
        rise.addcmul_(a_change, p.edge_pull).addcmul_(b_change, _edge(b_on_p_P2MR[:, :, :, None], 1, q.keep))
        total = rise.mul_(p_change)
        rise = torch.addcmul(q.slope, q_own, q_change).addcmul_(b_change, q.edge_pull)
        total.addcmul_(rise.addcmul_(a_change, _edge(a_on_q_P2MR[:, :, None], 1, p.keep)), q_change)
        rise = torch.addcmul(p.edge_slope, p.edge_bend, a_change)
        total.addcmul_(rise.addcmul_(b_change, _edge(a_on_b_PM2R[:, :, :, None], 2, q.keep)), a_change)
        total.addcmul_(torch.addcmul(q.edge_slope, q.edge_bend, b_change), b_change)
        return total.sum(-1)

    def _side(self, groups_P: Tensor, rows: slice, dim: int) -> Side:
        """The sides of these groups, with an extra dimension for the partners' places."""
        return Side(*self.sides_GMFR[..., rows].index_select(0, groups_P).unsqueeze(dim).unbind(3))

    def _describe(self, groups_K: Tensor) -> None:
        """Updates what depends on these groups' channels, and for all groups what depends on the slope."""
        channels_KM = self.groups_GM[groups_K]
        rank_KMR, weight_KMR = self.rank_CR[channels_KM], self.dense_CR[channels_KM]
        keep_KMR = best(rank_KMR, self.n)
        last_K1R = rank_KMR.masked_fill(~keep_KMR, -1).amax(1, keepdim=True)
        first_K1R = rank_KMR.masked_fill(keep_KMR, torch.inf).amin(1, keepdim=True)
        last_KMR = weight_KMR.masked_fill(rank_KMR != last_K1R, 0.0)
        first_KMR = weight_KMR.masked_fill(rank_KMR != first_K1R, 0.0)
        gram_KMM = self.gram_CC[channels_KM[:, :, None], channels_KM[:, None]]
        last_pull_KMR, first_pull_KMR = 2 * (gram_KMM @ last_KMR), 2 * (gram_KMM @ first_KMR)
        last_bend_K1R = (last_pull_KMR * last_KMR).sum(1, keepdim=True) / 2
        first_bend_K1R = (first_pull_KMR * first_KMR).sum(1, keepdim=True) / 2
        self.edges_G2MR[groups_K] = torch.stack([last_KMR, first_KMR - last_KMR], dim=1)
        known = [
            keep_KMR.to(weight_KMR.dtype),
            rank_KMR,
            weight_KMR,
            torch.where(keep_KMR, first_K1R, last_K1R),
            torch.where(keep_KMR, first_pull_KMR, last_pull_KMR),
            torch.where(keep_KMR, first_bend_K1R, last_bend_K1R),
        ]
        self.sides_GMFR[groups_K, :, :6] = torch.stack(known, dim=2)
        slope_GMR = self.slope_CR[self.groups_GM]
        edge_G2R = (slope_GMR[:, None] * self.edges_G2MR).sum(2)
        edge_GMR = torch.addcmul(edge_G2R[:, :1], self.sides_GMFR[:, :, 0], edge_G2R[:, 1:])
        self.sides_GMFR[:, :, 6:] = torch.stack([slope_GMR, edge_GMR], dim=2)


def best(rank_KMR: Tensor, n: int) -> Tensor:
    """The keep mask of the n lowest ranks of each M."""
    return (rank_KMR[:, None] < rank_KMR[:, :, None]).sum(2) < n


def lost(rank_CR: Tensor, dense_CR: Tensor, channels_KM: Tensor, n: int) -> Tensor:
    """The pruned weights of the groups that these channels would form; 0 for kept weights (K x M x R)."""
    return dense_CR[channels_KM].masked_fill_(best(rank_CR[channels_KM], n), 0.0)


def _edge(edges: Tensor, dim: int, keep: Tensor) -> Tensor:
    """Chooses one of a group's two edges: first pruned if the channel was kept, else last kept."""
    last, more = edges.unbind(dim)
    return torch.addcmul(last, keep, more)
