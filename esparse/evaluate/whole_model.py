"""Losses of a model that lies in memory, by its own forward: it may be packed, or dispatched to several devices.

Shapes: W windows, L tokens of a window, B windows at once, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from esparse.evaluate.perplexity import mean_losses
from esparse.models.head import hidden_states, parts, plain_head


@torch.no_grad()
def losses(model: Any, windows_WL: Tensor, windows_at_once: int) -> Tensor:
    """The mean loss (nats, float64) of each window, over its tokens with a predecessor in the window: W values.

    A model whose logits are what its head returns has no logits of a whole window in memory: they may be many times as
    large as its hidden states.
    """
    device = model.get_input_embeddings().weight.device
    head = plain_head(model, windows_WL[:1].to(device))
    found: list[float] = []
    for tokens_BL in windows_WL.split(windows_at_once):
        found += mean_losses(_logits(model, head, tokens_BL.to(device)), tokens_BL)
    return torch.tensor(found, dtype=torch.float64)


def _logits(model: Any, head: nn.Module | None, tokens_BL: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which tokens, and their logits, part by part."""
    if head is None:
        yield slice(0, tokens_BL.shape[1]), model(input_ids=tokens_BL, use_cache=False).logits
        return
    hidden_BLH = hidden_states(head, lambda: model(input_ids=tokens_BL, use_cache=False))
    for part in parts(hidden_BLH, model.get_input_embeddings().weight.shape[0]):
        yield part, head(hidden_BLH[:, part])
