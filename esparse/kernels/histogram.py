"""The histograms of many channels at once on a CPU, in a loop that numba compiles (an extra, `cpu`).

PyTorch writes the place of every value to memory before it counts.

Shapes: T tokens, I input channels, K bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

CHANNELS = 128  # whose bins, 50 KiB for 100 of them, stay close to a core
TOKENS = 8  # whose bins are found before they are counted: the first is done for many channels at a time


@njit(nogil=True, cache=True)
def count(x_TI: Any, first: int, end: int, low_I: Any, scale_I: Any, counts_IK: Any) -> None:
    """Counts the values of the channels from `first` to `end` into bin (x - low) scale, or the nearest there is.

    All float32, the counts int64. NaN counts into the first bin.
    """
    bins = counts_IK.shape[1]
    least, most = np.float32(0), np.float32(bins - 1)
    begin_C = np.arange(CHANNELS).astype(np.int32) * np.int32(bins)
    places_TC = np.empty((TOKENS, CHANNELS), np.int32)
    for start in range(first, end, CHANNELS):
        width = min(CHANNELS, end - start)
        low, scale = low_I[start : start + width], scale_I[start : start + width]
        found = np.zeros(CHANNELS * bins, np.uint32)
        for token in range(0, len(x_TI), TOKENS):
            tokens = min(TOKENS, len(x_TI) - token)
            for t in range(tokens):
                row, places = x_TI[token + t, start : start + width], places_TC[t]
                for i in range(width):
                    value = (row[i] - low[i]) * scale[i]
                    value = value if value > least else least
                    value = value if value < most else most
                    places[i] = np.int32(value) + begin_C[i]
            for t in range(tokens):
                places = places_TC[t]
                for i in range(width):
                    found[np.uint32(places[i])] += np.uint32(1)  # unsigned: no place counts from the end
        for i in range(width):
            for k in range(bins):
                counts_IK[start + i, k] += found[i * bins + k]
