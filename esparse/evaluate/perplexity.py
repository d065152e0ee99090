"""Perplexity on fixed windows, one block at a time.

Shapes: W windows, L tokens of a window, B windows of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esparse.models.blocks import Activations, BlockModel


@torch.inference_mode()
def perplexity(
    blocks: BlockModel, windows_WL: Tensor, on_block: Callable[[int], None] = lambda index: None
) -> float:
    """exp of the mean negative log-likelihood of every token that has a predecessor in its window.

    Logits are cast to float32 before the loss and the sum is kept in float64: on half-precision logits one window's
    perplexity was seen to move by 0.2 %. Raises ValueError where the loss is not finite.
    """
    activations = Activations(blocks, windows_WL)
    for index in range(len(blocks.blocks)):
        with blocks.resident(index):
            activations.advance(index)
        on_block(index)
    total = 0.0
    with blocks.ends_resident():
        for ids_BL, hidden_BLH in zip(blocks.micro_batches(windows_WL), activations.hidden, strict=True):
            total += _negative_log_likelihood(blocks.logits(ids_BL, hidden_BLH), ids_BL)
    mean = total / (windows_WL.shape[0] * (windows_WL.shape[1] - 1))
    if not math.isfinite(mean):
        raise ValueError("the perplexity is not a finite number: the model's logits hold NaN or Inf")
    return math.exp(min(mean, 700.0))


def _negative_log_likelihood(logits_BLV: Tensor, ids_BL: Tensor) -> float:
    """The sum in nats; one window at a time, since float32 logits of a large vocabulary are large."""
    return sum(
        float(cross_entropy(logits_LV[:-1].float(), ids_L[1:].to(logits_LV.device), reduction="sum").double())
        for logits_LV, ids_L in zip(logits_BLV, ids_BL, strict=True)
    )
