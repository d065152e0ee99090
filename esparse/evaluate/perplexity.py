"""Perplexity on fixed windows, one block at a time.

Shapes: W windows, L tokens of a window, B windows of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esparse.models import host_memory
from esparse.models.activations import Activations
from esparse.models.blocks import BlockModel
from esparse.models.damage import of_ends


@torch.no_grad()
def window_losses(
    blocks: BlockModel, windows_WL: Tensor, on_block: Callable[[int], None] = lambda index: None
) -> Tensor:
    """The mean loss (nats, float64) of each window, over its tokens with a predecessor in the window: W values.

    The loss is computed from float32 logits: with half-precision logits one window's perplexity changed by 0.2 %. Ranks
    share the windows, and all get all losses. Raises Mistake if a loss is NaN or Inf.
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
            losses += mean_losses(activations.logits_in_parts(batch, ids_BL), ids_BL)
    losses_W = blocks.ranks.joined(torch.tensor(losses, dtype=torch.float64))
    if not torch.isfinite(losses_W).all():
        raise of_ends(blocks, "the perplexity is not a finite number: the model's logits hold NaN or Inf")
    return losses_W


def perplexity(losses_W: Tensor) -> float:
    """exp of the mean loss; all windows have the same length, so this is the mean over tokens."""
    return math.exp(min(float(losses_W.mean()), 700.0))


def mean_losses(parts: Iterable[tuple[slice, Tensor]], ids_BL: Tensor) -> list[float]:
    """The mean loss of every window, over its tokens with a predecessor in the window.

    `parts`: which tokens, and their logits (B x T x V), one after the other.
    """
    found: list[list[Tensor]] = [[] for _ in ids_BL]
    for part, logits_BTV in parts:
        for losses, logits_TV, ids_L in zip(found, logits_BTV, ids_BL, strict=True):
            next_T = ids_L[part.start + 1 : part.stop + 1]
            losses.append(_losses(logits_TV[: len(next_T)], next_T))
        on_host = logits_BTV.device.type == "cpu"
        del logits_BTV, logits_TV  # before the next ones are made
        if on_host:
            host_memory.trim()  # a hole that one part leaves is too small for the next: the heap would grow with each
    return [float(torch.cat(losses).double().mean()) for losses in found]


def _losses(logits_TV: Tensor, next_T: Tensor) -> Tensor:
    # One window at a time: float32 logits of a large vocabulary are large.
    return cross_entropy(logits_TV.float(), next_T.to(logits_TV.device), reduction="none")
