"""Histograms of many channels at once on a CPU, compiled by numba (extra `cpu`).

PyTorch would write the bin of every value to memory before it counts.

Shapes: T tokens, I input channels, K bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

CHANNELS = 128  # counted at a time: their bins (50 KiB at 100 bins each) stay in a core's cache
TOKENS = 8  # tokens whose bins are computed before they are counted, so that the first step uses vectors


@njit(nogil=True, cache=True)
def count(x_TI: Any, first: int, end: int, low_I: Any, scale_I: Any, counts_IK: Any) -> None:
    """Counts the values of the channels from `first` to before `end` into bin (x - low) scale, or the nearest bin.

    Values are float32, counts int64. NaN counts into the first bin.
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
                    found[np.uint32(places[i])] += np.uint32(1)  # unsigned, to skip the check for negative indices
        for i in range(width):
            for k in range(bins):
                counts_IK[start + i, k] += found[i * bins + k]
