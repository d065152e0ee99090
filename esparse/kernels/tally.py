"""Sums, extremes and histograms of many channels at once on a GPU, each in one pass over the values.

PyTorch would write a float32 copy, or the bin of every value, to memory first. The kernels compute in float32 whatever
the dtype of the values; rows must be contiguous.

Shapes: T tokens, I input channels, K bins, P parts of the tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esparse.kernels.current import on_its_gpu

CHANNELS = 128  # per program
TOKENS = 256  # reduced to one part
STEP = 16  # tokens that a program reads at a time
COUNTED = 512  # tokens that one program counts; a multiple of four


def squares(x_TI: Tensor) -> Tensor:
    """The sums of squares of each channel over every `TOKENS` tokens (P x I, float32)."""
    return _reduced(x_TI, 1)[0]


def extremes(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each channel over every `TOKENS` tokens (P x I each, float32)."""
    least_PI, greatest_PI = _reduced(x_TI, 2)
    return least_PI, greatest_PI


@on_its_gpu
def _reduced(x_TI: Tensor, results: int) -> Tensor:
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    tokens, inputs = x_TI.shape
    parts = triton.cdiv(tokens, TOKENS)
    out = torch.empty(results, parts, inputs, dtype=torch.float32, device=x_TI.device)
    _reduce_kernel[(triton.cdiv(inputs, CHANNELS), parts)](
        x_TI,
        out,
        tokens,
        inputs,
        x_TI.stride(0),
        parts * inputs,
        SQUARES=results == 1,
        TOKENS=TOKENS,
        STEP=STEP,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    return out


@on_its_gpu
def count(x_TI: Tensor, low_I: Tensor, scale_I: Tensor, counts_KI: Tensor) -> None:
    """Counts every value into bin (x - low) scale, or the nearest bin; counts are int32, one row per bin.

    With a row per bin, neighbouring channels (the lanes of a warp) have neighbouring counters, and values that crowd
    in few bins, as activations do, make few memory transfers.
    """
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    tokens, inputs = x_TI.shape
    _count_kernel[(triton.cdiv(inputs, CHANNELS), triton.cdiv(tokens, COUNTED))](
        x_TI,
        low_I,
        scale_I,
        counts_KI,
        tokens,
        inputs,
        x_TI.stride(0),
        float(len(counts_KI) - 1),
        COUNTED=COUNTED,
        CHANNELS=CHANNELS,
        num_warps=4,
    )


@triton.jit
def _reduce_kernel(
    x,
    out,
    tokens,
    inputs,
    stride,
    size,
    SQUARES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < inputs
    token = tl.program_id(1) * TOKENS + tl.arange(0, STEP)
    if SQUARES:
        total = tl.zeros((STEP, CHANNELS), tl.float32)
    else:
        least = tl.full((STEP, CHANNELS), float("inf"), tl.float32)
        greatest = tl.full((STEP, CHANNELS), float("-inf"), tl.float32)
    for step in range(0, TOKENS, STEP):
        now = token + step
        here = (now < tokens)[:, None] & inside[None, :]
        values = tl.load(x + now.to(tl.int64)[:, None] * stride + channel[None, :], mask=here, other=0.0)
        values = values.to(tl.float32)
        if SQUARES:
            total += values * values
        else:
            least = tl.minimum(least, tl.where(here, values, float("inf")))
            greatest = tl.maximum(greatest, tl.where(here, values, float("-inf")))
    place = tl.program_id(1).to(tl.int64) * inputs + channel
    if SQUARES:
        tl.store(out + place, tl.sum(total, 0), mask=inside)
    else:
        tl.store(out + place, tl.min(least, 0), mask=inside)
        tl.store(out + size + place, tl.max(greatest, 0), mask=inside)


@triton.jit
def _count_kernel(
    x,
    low,
    scale,
    counts,
    tokens,
    inputs,
    stride,
    last,
    COUNTED: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < inputs
    least = tl.load(low + channel, mask=inside, other=0.0)
    per_unit = tl.load(scale + channel, mask=inside, other=0.0)
    first = tl.program_id(1) * COUNTED
    place = x + first.to(tl.int64) * stride + channel
    counters = counts + channel
    end_C = tl.zeros((CHANNELS,), tl.int32) + tokens
    for step in range(first, tl.minimum(first + COUNTED, tokens), 4):
        # Four loads start before the first value is counted, because no load may be moved past a counter's update.
        a = tl.load(place, mask=inside, other=0.0)
        b = tl.load(place + stride, mask=inside & (step + 1 < end_C), other=0.0)
        c = tl.load(place + 2 * stride, mask=inside & (step + 2 < end_C), other=0.0)
        d = tl.load(place + 3 * stride, mask=inside & (step + 3 < end_C), other=0.0)
        _add_one(counters, a, least, per_unit, last, inputs, inside)
        _add_one(counters, b, least, per_unit, last, inputs, inside & (step + 1 < end_C))
        _add_one(counters, c, least, per_unit, last, inputs, inside & (step + 2 < end_C))
        _add_one(counters, d, least, per_unit, last, inputs, inside & (step + 3 < end_C))
        place += 4 * stride


@triton.jit
def _add_one(counters, values, least, per_unit, last, inputs, here):
    found = tl.minimum(tl.maximum((values.to(tl.float32) - least) * per_unit, 0.0), last).to(tl.int32)
    tl.atomic_add(counters + found.to(tl.int64) * inputs, 1, mask=here, sem="relaxed")
