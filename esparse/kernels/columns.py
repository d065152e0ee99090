"""SparseGPT's column sweep on a CPU, in a loop that numba compiles (an extra, `cpu`).

PyTorch goes through a block of columns with three operations for each, over all rows; here each row goes through it by
itself and stays in a core's first cache, and what survives costs nothing.

Shapes: O outputs, I inputs, B columns of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

LANES = 32  # columns that a vector loop takes at a time, without a rest


@njit(nogil=True, cache=True, fastmath={"contract"})
def sweep_rows(
    weight_OI: Any, keep_OI: Any, upper_BB: Any, start: int, m: int, n: int, tail_n: int, errors_OB: Any
) -> None:
    """Prunes the columns from `start` on, as many as `upper` has rows, and repairs those of them that are behind.

    What a pruned weight costs goes to the errors, by which all later columns are to be repaired, too. With m = 0 the
    keep mask is given; otherwise n of every m are chosen when the sweep reaches them, by w^2 / U_jj^2, the lowest index
    first among equals (`tail_n` of a shorter last group), and the mask is written. Float32 throughout.
    """
    block = len(upper_BB)
    width = (block + LANES - 1) // LANES * LANES
    # Flat, with zeros in place of the columns before: so a loop over them is one over whole vectors.
    upper = np.zeros(block * width, np.float32)
    for column in range(block):
        for later in range(column, block):
            upper[column * width + later] = upper_BB[column, later]
    weight, errors, chance = np.zeros(width, np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    gone = np.empty(block + 1, np.int64)  # columns that are pruned: a list, as a branch at each takes twice as long
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
                    # Unsigned: no place counts from the end, which would keep this from becoming vector instructions.
                    weight[np.uint64(begin + lane)] -= error * upper[np.uint64(column * width + begin + lane)]
            first = end
        for column in range(block):
            weight_OI[row, start + column] = weight[column]
            errors_OB[row, column] = errors[column]
