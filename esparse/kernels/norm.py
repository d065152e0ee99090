"""RMSNorm that writes its output in a shuffle's order, which saves a separate gather before a sparse layer.

Shapes: T tokens, H hidden channels, I inputs of the next layer (the H channels in another order).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esparse.kernels.current import on_its_gpu


def plain_norm(x_TH: Tensor, weight_H: Tensor, eps: float, order_I: Tensor | None = None) -> Tensor:
    """LLaMA's RMSNorm (float32 inside, rounded before it is multiplied by the weight), then the gather of channels."""
    x32 = x_TH.float()
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x_TH.dtype) * weight_H
    return normed if order_I is None else normed[..., order_I]


@on_its_gpu
def norm(x_TH: Tensor, weight_H: Tensor, eps: float, order_I: Tensor | None = None) -> Tensor:
    """Computes `plain_norm` in one kernel: row t, place i is channel order[i] of the normed token t."""
    hidden = x_TH.shape[-1]
    x = x_TH.reshape(-1, hidden).contiguous()
    out = torch.empty_like(x)
    block = min(triton.next_power_of_2(hidden), 16384)
    _norm_kernel[(len(x),)](
        x,
        weight_H,
        x if order_I is None else order_I,
        out,
        hidden,
        eps,
        ORDERED=order_I is not None,
        BLOCK=block,
        STEPS=triton.cdiv(hidden, block),
        num_warps=8 if block >= 4096 else 4,
    )
    return out.view(x_TH.shape)


@triton.jit
def _norm_kernel(
    x,
    weight,
    order,
    out,
    hidden,
    eps,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * hidden
    squares = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        place = step * BLOCK + tl.arange(0, BLOCK)
        part = tl.load(x + base + place, mask=place < hidden, other=0.0).to(tl.float32)
        squares += part * part
    scale = tl.rsqrt(tl.sum(squares, 0) / hidden + eps)
    for step in range(STEPS):
        place = step * BLOCK + tl.arange(0, BLOCK)
        here = place < hidden
        channel = tl.load(order + place, mask=here, other=0) if ORDERED else place
        part = tl.load(x + base + channel, mask=here, other=0.0)  # comes from the cache: the token was just read
        normed = (part.to(tl.float32) * scale).to(x.dtype.element_ty)
        gain = tl.load(weight + channel, mask=here, other=0.0)
        # The product is exact in float32, so it is rounded once, as a half-precision product is.
        scaled = normed.to(tl.float32) * gain.to(tl.float32)
        tl.store(out + base + place, scaled.to(out.dtype.element_ty), mask=here)
