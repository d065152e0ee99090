"""Losses of a model that lies in memory, by its own forward: it may be packed, or dispatched to several devices.

Shapes: W windows, L tokens of a window, B windows at once, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esparse.evaluate.perplexity import mean_losses
from esparse.models.activations import tokens_at_once

TRIED = 8  # tokens by which it is tried what a head does
LARGE = 64  # times their hidden states: small logits pass a cap unchanged, but for their last bits


@torch.no_grad()
def losses(model: Any, windows_WL: Tensor, windows_at_once: int) -> Tensor:
    """The mean loss (nats, float64) of each window, over its tokens with a predecessor in the window: W values.

    A model whose logits are what its head returns has no logits of a whole window in memory: they may be many times as
    large as its hidden states.
    """
    device = model.get_input_embeddings().weight.device
    head = _plain_head(model, windows_WL[:1, :TRIED].to(device))
    found: list[float] = []
    for tokens_BL in windows_WL.split(windows_at_once):
        found += mean_losses(_logits(model, head, tokens_BL.to(device)), tokens_BL)
    return torch.tensor(found, dtype=torch.float64)


def _logits(model: Any, head: nn.Module | None, tokens_BL: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which tokens, and their logits, part by part."""
    sequences, length = tokens_BL.shape
    if head is None:
        yield slice(0, length), model(input_ids=tokens_BL, use_cache=False).logits
        return
    with _entering(head, lambda hidden_BLH: hidden_BLH[:, :1]) as entered:
        model(input_ids=tokens_BL, use_cache=False)
    step = tokens_at_once(entered[0].device, sequences, model.get_input_embeddings().weight.shape[0])
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        yield part, head(entered[0][:, part])


def _plain_head(model: Any, tokens_BL: Tensor) -> nn.Module | None:
    """The module whose output are the logits of the tokens that it is given; None if something comes behind it."""
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        return None
    with _entering(head, lambda hidden_BLH: LARGE * hidden_BLH) as entered:
        logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits
    if len(entered) != 1 or entered[0].shape[:2] != tokens_BL.shape:
        return None
    return head if torch.equal(head(LARGE * entered[0]), logits_BLV) else None


@contextmanager
def _entering(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """While open, records what enters the head, and lets it have something else."""
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:  # called by keyword: `_plain_head` then finds nothing that entered
            return None
        entered.append(args[0])
        return (change(args[0]), *args[1:])

    hook = head.register_forward_pre_hook(enter)
    try:
        yield entered
    finally:
        hook.remove()
