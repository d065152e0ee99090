"""Decodes one token after a context, repeatedly at the same position: the decode step of a benchmark."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Context(DynamicCache):
    """Keys and values of a context. Once `closed`, it adds a step's own keys and values only for that step.

    Every step is then at the same position and does the same work, so it can be captured into a CUDA graph.
    """

    closed = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.closed:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


@torch.inference_mode()
def read(model: PreTrainedModel, tokens_BL: Tensor) -> Context:
    """Runs the tokens; returns their closed context."""
    context = Context(config=model.config)
    model(tokens_BL, past_key_values=context, use_cache=True)
    context.closed = True
    return context


def prefill(model: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
    """The logits of all tokens."""
    return model(tokens_BL, use_cache=False).logits


def step(model: PreTrainedModel, tokens_B1: Tensor, context: Context) -> Tensor:
    """The logits after one more token of each sequence."""
    return model(tokens_B1, past_key_values=context, use_cache=True).logits
