"""SparseGPT's column sweep on a CPU, compiled by numba (extra `cpu`).

PyTorch needs three operations over all rows for every column of a block. Here each row passes through the block alone,
so that it stays in a core's first cache, and kept columns are skipped.

Shapes: O outputs, I inputs, B columns of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

LANES = 32  # columns per step of a vector loop; widths are padded to a multiple


@njit(nogil=True, cache=True, fastmath={"contract"})
def sweep_rows(
    weight_OI: Any, keep_OI: Any, upper_BB: Any, start: int, m: int, n: int, tail_n: int, errors_OB: Any
) -> None:
    """Prunes the columns from `start` on, as many as `upper` has rows, and repairs later columns of this block.

    `errors_OB` receives the scaled errors of the pruned weights; the caller repairs the columns behind the block with
    them. If m = 0 the keep mask is given. Otherwise the sweep chooses n of every m when it reaches them, by
    w^2 / U_jj^2, the lowest index first among equals (`tail_n` of a shorter last group), and writes the mask. All
    values are float32.
    """
    block = len(upper_BB)
    width = (block + LANES - 1) // LANES * LANES
    # Flat, with zeros for earlier columns, so that inner loops always run over whole vectors.
    upper = np.zeros(block * width, np.float32)
    for column in range(block):
        for later in range(column, block):
            upper[column * width + later] = upper_BB[column, later]
    weight, errors, chance = np.zeros(width, np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    gone = np.empty(block + 1, np.int64)  # the pruned columns, listed: a branch at every column takes twice as long
    for row in range(len(weight_OI)):
        for column in range(block):
            weight[column] = weight_OI[row, start + column]
            errors[column] = np.float32(0)
        first = 0
        while first < block:
            end = min(first + m, block) if m else block
            if m:
                for column in range(first, end):
                    keep_OI[row, start + column] = False
                    value = weight[column] / upper_BB[column, column]
                    chance[column] = value * value
                for _ in range(n if end - first == m else tail_n):
                    best = first
                    for column in range(first, end):
                        if chance[column] > chance[best]:
                            best = column
                    keep_OI[row, start + best] = True
                    chance[best] = np.float32(-1)
            count = 0
            for column in range(first, end):
                gone[count] = column
                count += not keep_OI[row, start + column]
            for k in range(count):
                column = gone[k]
                error = weight[column] / upper_BB[column, column]
                errors[column] = error
                begin = column // LANES * LANES
                for lane in range(width - begin):
                    # Unsigned, because checks for negative indices would prevent vector instructions.
                    weight[np.uint64(begin + lane)] -= error * upper[np.uint64(column * width + begin + lane)]
            first = end
        for column in range(block):
            weight_OI[row, start + column] = weight[column]
            errors_OB[row, column] = errors[column]
