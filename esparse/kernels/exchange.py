"""The inner loops of the search for better groups, on a GPU: thresholds of groups, and the gains of swaps.

PyTorch has no operation for these sums: it would write every maximum to memory, block after block.

Shapes: B blocks, C channels of a block, R rows, K groups, M slots of a group, P parts of the rows, S stripes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esparse.kernels.current import on_its_gpu

STRIPE = 512  # rows summed in float32; a multiple of four
ROWS = 256  # of a group per program of `_cut_kernel`
HELD = 32  # most slots per program that takes several groups
CHANNELS = 256  # most channels per program


@on_its_gpu
def cut(columns_BCR: Tensor, block_K: Tensor, channels_KM: Tensor, *, n: int) -> tuple[Tensor, Tensor]:
    """The score that each group keeps, n per row (K, float64), and each slot's threshold (K x R x M).

    The threshold of a slot is the n-th largest of the others. Scores are float32.
    """
    groups, slots = channels_KM.shape
    _, channels, rows = columns_BCR.shape
    parts = triton.cdiv(rows, ROWS)
    kept_KP = torch.empty(groups, parts, dtype=torch.float64, device=columns_BCR.device)
    levels_KRM = torch.empty(groups, rows, slots, dtype=torch.float32, device=columns_BCR.device)
    if groups:
        _cut_kernel[(groups, parts)](
            columns_BCR,
            block_K.contiguous(),
            channels_KM.contiguous(),
            kept_KP,
            levels_KRM,
            channels,
            rows,
            parts,
            SLOTS=slots,
            KEEP=n,
            PLACES=triton.next_power_of_2(slots),
            ROWS=ROWS,
            num_warps=4 if slots <= 16 else 8,
        )
    return kept_KP.sum(1), levels_KRM


@on_its_gpu
def summed_maxima(levels_KRM: Tensor, rows_BRC: Tensor, block_K: Tensor, together: int) -> Tensor:
    """sum_r max(level_p[r], score_q[r]) for each slot p of the groups and each channel q (K x M x C, float64).

    `block_K`: the block whose channels are taken; every `together` consecutive groups (at most `HELD` slots) must
    have the same one. Scores are float32 with contiguous rows. Sums are float32 within a stripe, in a fixed order.
    """
    groups, rows, slots = levels_KRM.shape
    channels = rows_BRC.shape[2]
    stripes = triton.cdiv(rows, STRIPE)
    sums_SKMC = torch.empty(stripes, groups, slots, channels, dtype=torch.float32, device=levels_KRM.device)
    width = min(max(32, triton.next_power_of_2(channels)), CHANNELS)
    if groups:
        _maxima_kernel[(triton.cdiv(groups, together), triton.cdiv(channels, width), stripes)](
            levels_KRM,
            rows_BRC,
            block_K.contiguous(),
            sums_SKMC,
            groups * slots,
            channels,
            rows,
            SLOTS=slots,
            TOGETHER=together,
            STRIPE=STRIPE,
            HELD=max(4, triton.next_power_of_2(together * slots)),
            CHANNELS=width,
            num_warps=width // 32,  # one channel per thread, so that scores stay in their registers
        )
    return sums_SKMC.sum(0, dtype=torch.float64)


@triton.jit
def _cut_kernel(
    columns,
    block,
    members,
    kept,
    levels,
    channels,
    rows,
    parts,
    SLOTS: tl.constexpr,
    KEEP: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, PLACES)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_slot = slot < SLOTS
    here = is_slot[:, None] & (row < rows)[None, :]
    channel = tl.load(block + group) * channels + tl.load(members + group * SLOTS + slot, mask=is_slot, other=0)
    scores = tl.load(columns + channel.to(tl.int64)[:, None] * rows + row[None, :], mask=here, other=0.0)
    left = tl.where(is_slot[:, None], scores, float("-inf"))
    lowest = tl.zeros((ROWS,), tl.float32)  # becomes v_n
    total = tl.zeros((ROWS,), tl.float64)
    for _ in range(KEEP):
        lowest = tl.max(left, 0)
        total += lowest.to(tl.float64)
        # Equal scores are taken one at a time.
        first = tl.min(tl.where(left == lowest[None, :], slot[:, None], PLACES), 0)
        left = tl.where(slot[:, None] == first[None, :], float("-inf"), left)
    following = tl.max(left, 0)
    tl.store(kept + group * parts + tl.program_id(1), tl.sum(total, 0))
    level = tl.where(scores >= lowest[None, :], following[None, :], lowest[None, :])
    tl.store(levels + (group * rows + row)[None, :] * SLOTS + slot[:, None], level, mask=here)


@triton.jit
def _maxima_kernel(
    levels_at,
    scores_at,
    block,
    sums,
    levels,
    channels,
    rows,
    SLOTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    STRIPE: tl.constexpr,
    HELD: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * TOGETHER
    place = tl.arange(0, HELD)
    level = group * SLOTS + place
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_level = (place < TOGETHER * SLOTS) & (level < levels)
    inside = channel < channels
    first = tl.program_id(2) * STRIPE
    scores = scores_at + (tl.load(block + group).to(tl.int64) * rows + first) * channels + channel
    of_group = (place // SLOTS).to(tl.int64) * rows * SLOTS
    thresholds = levels_at + (group * rows + first) * SLOTS + of_group + place % SLOTS
    end_P, end_C = tl.zeros((HELD,), tl.int32) + rows, tl.zeros((CHANNELS,), tl.int32) + rows
    total = tl.zeros((HELD, CHANNELS), tl.float32)
    # Four rows are loaded at a time; rows beyond the last one are 0.
    for row in range(first, tl.minimum(first + STRIPE, rows), 4):
        s0 = tl.load(scores, mask=inside, other=0.0)
        s1 = tl.load(scores + channels, mask=inside & (row + 1 < end_C), other=0.0)
        s2 = tl.load(scores + 2 * channels, mask=inside & (row + 2 < end_C), other=0.0)
        s3 = tl.load(scores + 3 * channels, mask=inside & (row + 3 < end_C), other=0.0)
        t0 = tl.load(thresholds, mask=is_level, other=0.0)
        t1 = tl.load(thresholds + SLOTS, mask=is_level & (row + 1 < end_P), other=0.0)
        pair = tl.maximum(t0[:, None], s0[None, :]) + tl.maximum(t1[:, None], s1[None, :])
        t2 = tl.load(thresholds + 2 * SLOTS, mask=is_level & (row + 2 < end_P), other=0.0)
        t3 = tl.load(thresholds + 3 * SLOTS, mask=is_level & (row + 3 < end_P), other=0.0)
        # Sums pairs first: adding one after the other would lose a digit.
        total += pair + (tl.maximum(t2[:, None], s2[None, :]) + tl.maximum(t3[:, None], s3[None, :]))
        thresholds += 4 * SLOTS
        scores += 4 * channels
    there = (tl.program_id(2).to(tl.int64) * levels + level)[:, None] * channels + channel[None, :]
    tl.store(sums + there, total, mask=is_level[:, None] & inside[None, :])
