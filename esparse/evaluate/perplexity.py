"""Perplexity on fixed windows, one block at a time.

Shapes: W windows, L tokens of a window, B windows of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esparse.errors import Mistake
from esparse.models.activations import Activations
from esparse.models.blocks import BlockModel


@torch.no_grad()
def window_losses(
    blocks: BlockModel, windows_WL: Tensor, on_block: Callable[[int], None] = lambda index: None
) -> Tensor:
    """The mean negative log-likelihood (nats, float64) of each window's tokens that have a predecessor in it: W values.

    Logits are cast to float32 before the loss: on half-precision logits one window's perplexity was seen to move by
    0.2 %. Several ranks share the windows, and all get all losses. Raises ValueError where a loss is not finite.
    """
    windows_WL = blocks.ranks.share(windows_WL)
    activations = Activations(blocks, windows_WL)
    for index in range(len(blocks.blocks)):
        with blocks.resident(index):
            activations.advance(index)
        on_block(index)
    losses = []
    with blocks.ends_resident():
        for batch, ids_BL in enumerate(blocks.micro_batches(windows_WL)):
            losses += [mean_loss(*window) for window in zip(activations.logits(batch, ids_BL), ids_BL, strict=True)]
    losses_W = blocks.ranks.joined(torch.tensor(losses, dtype=torch.float64))
    if not torch.isfinite(losses_W).all():
        raise Mistake("the perplexity is not a finite number: the model's logits hold NaN or Inf")
    return losses_W


def perplexity(losses_W: Tensor) -> float:
    """exp of the mean loss; all windows are equally long, so that this is the mean over tokens."""
    return math.exp(min(float(losses_W.mean()), 700.0))


def mean_loss(logits_LV: Tensor, ids_L: Tensor) -> float:
    # One window at a time: float32 logits of a large vocabulary are large.
    targets_L = ids_L[1:].to(logits_LV.device)
    return float(cross_entropy(logits_LV[:-1].float(), targets_L, reduction="none").double().mean())
