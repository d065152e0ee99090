"""Decoding one token behind a context, again and again: what a benchmark of the decode step needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Context(DynamicCache):
    """Keys and values of a context. Once it is `closed`, a step sees them and its own, and leaves none of its own.

    Each step then is at the same position and does the same work, and can be captured into a CUDA graph.
    """

    closed = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.closed:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


@torch.inference_mode()
def read(model: PreTrainedModel, tokens_BL: Tensor) -> Context:
    """The closed context of these tokens."""
    context = Context(config=model.config)
    model(tokens_BL, past_key_values=context, use_cache=True)
    context.closed = True
    return context


def prefill(model: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
    """The logits of all tokens."""
    return model(tokens_BL, use_cache=False).logits


def step(model: PreTrainedModel, tokens_B1: Tensor, context: Context) -> Tensor:
    """The logits behind one more token of each sequence."""
    return model(tokens_B1, past_key_values=context, use_cache=True).logits
