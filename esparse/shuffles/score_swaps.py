"""Greedy channel swaps inside blocks: the search of E-Sparse's local block shuffle (arXiv 2310.15929).

The classic search (Pool & Yu, NeurIPS 2021) swaps the two channels of different groups that raise the total kept score
most, until no swap raises it. Here every sweep makes all swaps that are the best choice of both their groups, and then
recomputes only what depends on the changed groups.

The gain of a swap needs no sorting. Let v_1 >= ... >= v_M be one row of a group, and p one of its channels. Leave p
out: the n-th largest of the others is b_p, which is v_{n+1} if p was kept and v_n if it was not. With value x in place
of p the group keeps max(b_p, x) and n - 1 others that do not depend on x. Summed over the rows,

    cross[p, q] = sum_r max(b_p[r], x_q[r]),   gain(p, q) = cross[p, q] - cross[p, p] + cross[q, p] - cross[q, q],

exactly, for every n:m. All p of a group share two thresholds per row, v_n and v_{n+1}, so two maxima per channel q are
enough, and a product with the group's keep mask sums them for each p. On a CPU this takes half the time of one maximum
per pair (p, q) at 2:4 and a third at 4:8; `torch.cdist` (max(a, b) = (a + b + |a - b|) / 2) takes four times as long.
With numba a compiled loop computes the sums (esparse/kernels/maxima.py) and releases Python's lock for other threads.
On a GPU a Triton kernel takes one maximum per pair, which is cheap if it is not written to memory
(esparse/kernels/exchange.py).

Shapes: O outputs, I inputs, R = O rows; B blocks of equal width, C channels of a block, G groups of a block,
M channels of a group, K groups taken from any block, T thresholds of a group, N = T R, P swaps. A place is an index
within a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from esparse import kernels
from esparse.errors import Mistake
from esparse.parallel.cores import each_core

# A swap must raise the score that its two groups keep by more than this share. The float32 sums behind a gain have
# relative errors near 1e-7, so that smaller gains may be noise, and all of them together are not worth a sweep.
TOLERANCE = 1e-6
# Rows that are summed in float32.
STRIPE = 1024
# Groups and rows of maxima at a time: on a CPU 1 MiB for blocks of 256, which stays in a core's cache.
CPU_TILE, GPU_TILE = (4, 128), (128, 1024)
# Scores of the blocks that one CPU core searches together: more would leave its cache; with fewer, Python's overhead
# (one thread at a time) dominates.
TOGETHER = 2**20


def swap_in_blocks(scores_OI: Tensor, start_I: Tensor, *, n: int, m: int, block: int) -> Tensor:
    """The start order after the greedy swaps inside each of its blocks (int64, on the scores' device).

    A block has `block` consecutive places, rounded down to whole groups; the last block may be narrower. Channels after
    the last whole group stay in place. Channels ascend within a group.
    """
    width = block_width(block, m)
    whole = len(start_I) - len(start_I) % m

    def swapped(start_BC: Tensor) -> Tensor:
        rows_BRC = scores_OI.detach()[:, start_BC].movedim(1, 0)
        rows_BRC = rows_BRC.to(torch.promote_types(rows_BRC.dtype, torch.float32)).contiguous()
        return start_BC.gather(1, swap_greedily(rows_BRC, n=n, m=m))

    order_GM = torch.cat(_over_blocks(swapped, start_I[:whole].split(width), len(scores_OI))).unflatten(0, (-1, m))
    return torch.cat([order_GM.sort(dim=-1).values.flatten(), start_I[whole:]])


def block_width(block: int, m: int) -> int:
    """The channels of a block, rounded down to whole groups; raises Mistake if that is less than two groups."""
    if block < 2 * m:
        raise Mistake(f"a block of {block} channels holds fewer than two groups of {m}: use at least {2 * m}")
    return block - block % m


def swap_greedily(rows_BRC: Tensor, *, n: int, m: int) -> Tensor:
    """The channel at each place of each block after the search (B x C); at the start, channel c is at place c."""
    search = _Search.begin(rows_BRC, n, m)
    while search.sweep():
        pass
    return search.order_BC


def swap_gains(rows_BRC: Tensor, *, n: int, m: int) -> Tensor:
    """The gain in total kept score of each swap of two channels of different groups (B x C x C, float64)."""
    return _Search.begin(rows_BRC, n, m).gains()


def _over_blocks(swapped: Callable[[Tensor], Tensor], blocks: tuple[Tensor, ...], rows: int) -> list[Tensor]:
    """Runs the search on each block (on a GPU, on all blocks of equal width at once); returns their orders."""
    equal = torch.stack([start_C for start_C in blocks if len(start_C) == len(blocks[0])])
    rest = [start_C[None] for start_C in blocks[len(equal) :]]
    if equal.device.type != "cpu":
        return [swapped(start_BC).flatten() for start_BC in (equal, *rest)]
    # Each core searches its own blocks. Splitting every operation over the cores would cost a barrier per operation,
    # and the sums, and with them the order, would depend on the number of cores.
    each = -(-len(equal) // torch.get_num_threads())
    each = max(1, min(each, TOGETHER // (rows * equal.shape[1])))
    with each_core() as pool:
        return list(pool.map(lambda start_BC: swapped(start_BC).flatten(), (*equal.split(each), *rest)))


@dataclass(slots=True)
class _Cut:
    """The kept score and the thresholds of some groups."""

    kept_K: Tensor  # total kept score, float64
    levels: Tensor  # K x 2 x R: v_n and v_{n+1} of each row; from the GPU kernels K x R x M: b_p of each channel
    which_KM2R: Tensor | None  # which of the two is b_p: the second if the channel was kept, else the first

    def split(self, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.which_KM2R is not None
        return zip(self.levels.split(sizes), self.which_KM2R.split(sizes), strict=True)

    def only(self, index_K: Tensor) -> _Cut:
        which_KM2R = None if self.which_KM2R is None else self.which_KM2R[index_K]
        return _Cut(self.kept_K[index_K], self.levels[index_K], which_KM2R)


@dataclass(slots=True)
class _Search:
    """The state of the search; all blocks advance together."""

    n: int
    m: int
    rows_BRC: Tensor  # scores by channel; constant
    columns_BCR: Tensor  # the same, transposed
    order_BC: Tensor  # the channel at each place
    kept_BG: Tensor  # score that each group keeps, float64
    cross_BCC: Tensor  # by place, float64
    exchange: Any  # the Triton kernels, if the scores are on a GPU

    @classmethod
    def begin(cls, rows_BRC: Tensor, n: int, m: int) -> _Search:
        blocks, _, channels = rows_BRC.shape
        groups = channels // m
        device = rows_BRC.device
        order_BC = torch.arange(channels, device=device).repeat(blocks, 1)
        kept_BG = torch.zeros(blocks, groups, dtype=torch.float64, device=device)
        cross_BCC = torch.zeros(blocks, channels, channels, dtype=torch.float64, device=device)
        exchange = kernels.triton("exchange", device) if rows_BRC.dtype == torch.float32 else None
        search = cls(n, m, rows_BRC, rows_BRC.mT.contiguous(), order_BC, kept_BG, cross_BCC, exchange)
        block_K = torch.arange(blocks, device=device)[:, None].expand(-1, groups).flatten()
        group_K = torch.arange(groups, device=device).repeat(blocks)
        together = 1 if exchange is None else math.gcd(groups, 2 ** (max(1, exchange.HELD // m).bit_length() - 1))
        search._renew(block_K, group_K, search._cut(block_K, order_BC.reshape(-1, m)), together)
        return search

    def sweep(self) -> int:
        """Makes every proposed swap that truly raises the kept score; returns their number."""
        block_P, left_P, right_P = self._proposals()
        if not len(block_P):
            return 0
        trial_BC = self._swapped_order(block_P, left_P, right_P)
        block_K = block_P[:, None].expand(-1, 2).flatten()
        group_K = torch.stack([left_P, right_P], dim=1).flatten() // self.m
        cut = self._cut(block_K, trial_BC.unflatten(1, (-1, self.m))[block_K, group_K])
        # The recomputed kept score decides, not the gain from long float32 sums. It therefore never falls, and since
        # it cannot rise for ever, the search ends.
        before_K = self.kept_BG[block_K, group_K]
        rise_P = (cut.kept_K - before_K).view(-1, 2).sum(1)
        true_P = rise_P > TOLERANCE * before_K.abs().view(-1, 2).sum(1)
        # As indices, because every use of a mask would make the host wait for a GPU.
        index_P = true_P.nonzero()[:, 0]
        if len(index_P):
            block_P, left_P, right_P = block_P[index_P], left_P[index_P], right_P[index_P]
            self.order_BC = self._swapped_order(block_P, left_P, right_P)
            # Advanced indexing copies, so the right side is read before the left side is written.
            places_2P = torch.stack([left_P, right_P])
            self.cross_BCC[block_P, :, places_2P] = self.cross_BCC[block_P, :, places_2P.flip(0)]
            index_K = torch.stack([2 * index_P, 2 * index_P + 1], dim=1).flatten()
            self._renew(block_K[index_K], group_K[index_K], cut.only(index_K), 2)
        return len(index_P)

    def gains(self) -> Tensor:
        """The gain of each swap by place (B x C x C)."""
        one_sided_BCC = self.cross_BCC - self.cross_BCC.diagonal(dim1=1, dim2=2)[:, :, None]
        return one_sided_BCC + one_sided_BCC.mT

    def _proposals(self) -> tuple[Tensor, Tensor, Tensor]:
        """The swaps with a gain that are the best choice of both their groups: block, left and right place.

        Ties go to the lowest place. A block's best swap is always among them, because gains are symmetric.
        """
        gain_BGMGM = self.gains().unflatten(2, (-1, self.m)).unflatten(1, (-1, self.m))
        best_BGG = gain_BGMGM.amax(2).amax(-1)  # two reductions take a third of the time of one over both dimensions
        kept_BG = self.kept_BG.abs()
        worth_BGG = best_BGG > TOLERANCE * (kept_BG[:, :, None] + kept_BG[:, None, :])
        worth_BGG.diagonal(dim1=1, dim2=2).fill_(False)
        best_BGG = best_BGG.masked_fill(~worth_BGG, -torch.inf)
        partner_BG = best_BGG.argmax(dim=-1)
        group_G = torch.arange(partner_BG.shape[1], device=partner_BG.device)
        mutual_BG = (partner_BG.gather(1, partner_BG) == group_G) & (group_G < partner_BG)
        mutual_BG &= worth_BGG.gather(2, partner_BG[..., None]).squeeze(-1)
        block_P, left_P = mutual_BG.nonzero(as_tuple=True)
        right_P = partner_BG[block_P, left_P]
        slots_P = gain_BGMGM[block_P, left_P, :, right_P, :].flatten(1).argmax(dim=-1)
        return block_P, left_P * self.m + slots_P // self.m, right_P * self.m + slots_P % self.m

    def _swapped_order(self, block_P: Tensor, left_P: Tensor, right_P: Tensor) -> Tensor:
        order_BC = self.order_BC.clone()
        order_BC[block_P, left_P] = self.order_BC[block_P, right_P]
        order_BC[block_P, right_P] = self.order_BC[block_P, left_P]
        return order_BC

    def _cut(self, block_K: Tensor, channels_KM: Tensor) -> _Cut:
        """The kept score and thresholds of the groups that these channels would form."""
        if self.exchange is not None:
            kept_K, levels_KRM = self.exchange.cut(self.columns_BCR, block_K, channels_KM, n=self.n)
            return _Cut(kept_K, levels_KRM, None)
        scores_KMR = self.columns_BCR[block_K[:, None], channels_KM]
        top = largest(scores_KMR, self.n + 1)
        kept_K = torch.stack([value_KR.sum(-1, dtype=torch.float64) for value_KR in top[: self.n]]).sum(0)
        # If v_n = v_{n+1}, more than n channels may count as kept, but then both thresholds are equal.
        keep_KMR = (scores_KMR >= top[self.n - 1][:, None]).to(scores_KMR.dtype)
        return _Cut(
            kept_K=kept_K,
            levels=torch.stack(top[self.n - 1 :], dim=1),
            which_KM2R=torch.stack([1 - keep_KMR, keep_KMR], dim=2),
        )

    def _renew(self, block_K: Tensor, group_K: Tensor, cut: _Cut, together: int) -> None:
        """Updates what depends on these changed groups (blocks ascend): the scores they keep and their rows of `cross`.

        Every `together` consecutive groups are in one block.
        """
        self.kept_BG[block_K, group_K] = cut.kept_K
        if self.exchange is not None:
            sums_KMC = self.exchange.summed_maxima(cut.levels, self.rows_BRC, block_K, together)
            rows_KMC = sums_KMC.gather(2, self.order_BC[block_K, None].expand_as(sums_KMC))
        else:
            sizes = block_K.bincount(minlength=len(self.order_BC)).tolist()
            rows = [
                summed_maxima(thresholds_K2R, which_KM2R, scores_RC)[:, :, order_C]
                for (thresholds_K2R, which_KM2R), scores_RC, order_C in zip(
                    cut.split(sizes), self.rows_BRC, self.order_BC, strict=True
                )
            ]
            rows_KMC = torch.cat(rows)
        self.cross_BCC.unflatten(1, (-1, self.m))[block_K, group_K] = rows_KMC


def largest(scores_KMR: Tensor, count: int) -> list[Tensor]:
    """The `count` largest of each M in falling order; for few channels bubble sort is many times faster than a sort."""
    values = list(scores_KMR.unbind(1))
    for first in range(count):
        for right in range(len(values) - 1, first, -1):
            left_KR, right_KR = values[right - 1], values[right]
            values[right - 1], values[right] = torch.maximum(left_KR, right_KR), torch.minimum(left_KR, right_KR)
    return values[:count]


def summed_maxima(thresholds_KTR: Tensor, which_KMTR: Tensor, scores_RC: Tensor) -> Tensor:
    """sum_r max(b_p[r], x_q[r]) for each p of the groups and each channel q (K x M x C, float64).

    b_p is the one of a group's T thresholds (two here, one in an assignment) with `which` = 1 and not 0. Sums are
    float32 within `STRIPE` rows. With numba a CPU uses a compiled loop, whose sums are rounded differently.
    """
    groups, slots, thresholds, rows = which_KMTR.shape
    channels = scores_RC.shape[1]
    compiled = kernels.loops("maxima") if scores_RC.device.type == "cpu" else None
    if compiled is not None:
        sums_KMC = torch.zeros(groups, slots, channels, dtype=torch.float64)
        compiled.summed_maxima(
            thresholds_KTR.numpy(), which_KMTR.numpy(), scores_RC.contiguous().numpy(), sums_KMC.numpy()
        )
        return sums_KMC
    # Rows are cut alike for any number of groups, so that a group's sums do not depend on the other groups.
    group_step, row_step = CPU_TILE if scores_RC.device.type == "cpu" else GPU_TILE
    group_step = max(1, min(group_step, groups))
    buffer = scores_RC.new_empty(group_step * thresholds * row_step * channels)

    @cache
    def views(groups: int, rows: int) -> tuple[Tensor, Tensor]:
        size = (groups, thresholds, rows, channels)
        maxima_KTRC = buffer[: math.prod(size)].view(size)
        return maxima_KTRC, maxima_KTRC.flatten(1, 2)

    sums_KMC = scores_RC.new_zeros((groups, slots, channels), dtype=torch.float64)
    stripe = max(1, STRIPE // row_step) * row_step
    for first in range(0, rows, stripe):
        sum_KMC = torch.zeros_like(sums_KMC, dtype=scores_RC.dtype)
        sums = sum_KMC.split(group_step)
        for start in range(first, min(first + stripe, rows), row_step):
            tile = slice(start, start + row_step)
            scores = scores_RC[tile]
            levels = thresholds_KTR[..., tile, None].split(group_step)
            which = which_KMTR[..., tile].flatten(2).split(group_step)
            for into_KMC, levels_KTR1, which_KMN in zip(sums, levels, which, strict=True):
                maxima_KTRC, maxima_KNC = views(len(levels_KTR1), len(scores))
                torch.maximum(levels_KTR1, scores, out=maxima_KTRC)
                into_KMC.baddbmm_(which_KMN, maxima_KNC)
        sums_KMC += sum_KMC
    return sums_KMC
