"""The sums that give the gains of channel swaps, on a CPU, compiled by numba (extra `cpu`).

PyTorch has no operation for them: it writes every maximum to memory first, and takes Python's lock at every tile, so
that two threads are hardly faster than one.

Shapes: K groups, M slots of a group, T thresholds, R rows, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Rows summed in the scores' dtype; at 256 channels they take 128 KiB, which fits into a core's cache.
STRIPE = 128
TOGETHER = 4  # rows per step, so that a slot's sums are not stored for every row


@njit(nogil=True, cache=True, fastmath={"contract"})
def summed_maxima(thresholds_KTR: Any, which_KMTR: Any, scores_RC: Any, sums_KMC: Any) -> None:
    """Adds sum_t which[k, p, t, r] max(thresholds[k, t, r], scores[r, q]) over the rows to the sums (float64).

    `which` is 1 for one threshold per slot and row and 0 for the others. The loop takes the last threshold for all
    slots and adds the difference for slots with another one: two maxima per group, and one product per slot.
    """
    groups, slots, thresholds, rows = which_KMTR.shape
    channels, last = scores_RC.shape[1], thresholds - 1
    base, more = np.empty(channels, scores_RC.dtype), np.empty((slots, channels), scores_RC.dtype)
    low, rise = np.empty((TOGETHER, channels), scores_RC.dtype), np.empty((TOGETHER, channels), scores_RC.dtype)
    for first in range(0, rows, STRIPE):
        end = min(first + STRIPE, rows)
        for group in range(groups):
            base[:] = 0
            more[:] = 0
            for start in range(first, end, TOGETHER):
                count = min(TOGETHER, end - start)
                for k in range(count):
                    level, row, into = thresholds_KTR[group, last, start + k], scores_RC[start + k], low[k]
                    for q in range(channels):
                        value = row[q] if row[q] > level else level  # not max(), which checks for NaN
                        into[q] = value
                        base[q] += value
                for threshold in range(last):
                    for k in range(count):
                        level, row, into = thresholds_KTR[group, threshold, start + k], scores_RC[start + k], rise[k]
                        for q in range(channels):
                            into[q] = (row[q] if row[q] > level else level) - low[k, q]
                    for slot in range(slots):
                        takes, sums = which_KMTR[group, slot, threshold], more[slot]
                        if count == TOGETHER:
                            w0, w1, w2, w3 = takes[start], takes[start + 1], takes[start + 2], takes[start + 3]
                            d0, d1, d2, d3 = rise[0], rise[1], rise[2], rise[3]
                            for q in range(channels):
                                sums[q] += (w0 * d0[q] + w1 * d1[q]) + (w2 * d2[q] + w3 * d3[q])
                        else:
                            for k in range(count):
                                for q in range(channels):
                                    sums[q] += takes[start + k] * rise[k, q]
            for slot in range(slots):
                for q in range(channels):
                    sums_KMC[group, slot, q] += base[q] + more[slot, q]
