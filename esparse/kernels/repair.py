"""SparseGPT's column sweep on a GPU: a block of columns stays in registers while its columns are pruned in turn.

PyTorch would launch several operations for every column, each waiting for the one before.

Shapes: O outputs, I inputs, B columns of a block, R rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esparse.kernels.current import on_its_gpu

WIDEST = 128  # most columns of a block
ROWS = 32  # per program


@on_its_gpu
def sweep_block(
    weight_OI: Tensor, keep_OI: Tensor, upper_II: Tensor, start: int, end: int, m: int, n: int, tail_n: int
) -> Tensor:
    """Prunes the columns from `start` to before `end`, at most `WIDEST`, and repairs later ones among them, in place.

    Returns the scaled errors (O x B), with which the caller repairs all columns behind the block. If m = 0 the keep
    mask is given. Otherwise the sweep chooses n of every m when it reaches them, by w^2 / U_jj^2, the lowest index
    first among equals (`tail_n` of a shorter last group), and writes the mask. Values are float32, rows contiguous.
    """
    outputs, width = len(weight_OI), end - start
    errors_OB = torch.empty(outputs, width, dtype=torch.float32, device=weight_OI.device)
    _repair_kernel[(triton.cdiv(outputs, ROWS),)](
        weight_OI[:, start:],
        keep_OI.view(torch.uint8)[:, start:],
        upper_II[start:end, start:end].contiguous(),
        errors_OB,
        outputs,
        weight_OI.stride(0),
        keep_OI.stride(0),
        width,
        m or width,
        n,
        tail_n,
        CHOOSE=m > 0,
        ROWS=ROWS,
        BLOCK=max(16, triton.next_power_of_2(width)),
        num_warps=8,
    )
    return errors_OB


@triton.jit
def _repair_kernel(
    weight,
    keep,
    upper,
    errors,
    outputs,
    weight_stride,
    keep_stride,
    width,
    m,
    n,
    tail_n,
    CHOOSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < width
    here = (row < outputs)[:, None] & inside[None, :]
    weights = weight + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    keeps = keep + row.to(tl.int64)[:, None] * keep_stride + column[None, :]
    tile = tl.load(weights, mask=here, other=0.0)
    pivot = tl.load(upper + column * (width + 1), mask=inside, other=1.0)
    # The column's index if its weight is pruned, -1 if it is kept: one comparison then finds a column's loss.
    gone = tl.zeros((ROWS, BLOCK), tl.int32) + column[None, :]
    if not CHOOSE:
        gone = tl.where(tl.load(keeps, mask=here, other=1) != 0, -1, gone)
    for first in range(0, width, m):
        last = tl.minimum(first + m, width)
        if CHOOSE:
            value = tile / pivot[None, :]
            chance = tl.where((column >= first) & (column < last), value * value, -1.0)
            count = tl.where(first + m <= width, n, tail_n)
            for _ in range(count):
                best = tl.argmax(chance, 1, tie_break_left=True)
                taken = column[None, :] == best[:, None]
                gone = tl.where(taken, -1, gone)
                chance = tl.where(taken, -1.0, chance)
        for i in range(first, last):
            later = tl.load(upper + i * width + column, mask=inside, other=0.0)
            divisor = tl.load(upper + i * (width + 1))
            error = tl.sum(tl.where(gone == i, tile, 0.0), 1) / divisor
            # A pruned weight keeps its last value here, from which its error is computed again below.
            tile -= error[:, None] * tl.where(column > i, later, 0.0)[None, :]
    stays = gone < 0
    tl.store(weights, tl.where(stays, tile, 0.0), mask=here)
    there = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(errors + there, tl.where(stays, 0.0, tile / pivot[None, :]), mask=here)
    if CHOOSE:
        tl.store(keeps, stays.to(tl.uint8), mask=here)
