"""Caches one loaded model for the next run of this process that prunes the same model.

Every run gets its own copy of weights, buffers, configuration and tokenizer; only the last run that needs the cached
model gets that itself.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esparse.models import host_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = logging.getLogger("esparse")

FREE_MODELS = 3  # a copy is made only if the host has this many times the model's bytes free
CACHE_LINE = 64  # bytes

# At most one entry, by `load.identity`.
_kept: dict[str, tuple[PreTrainedModel, Tokenizer]] = {}


def take(identity: str) -> tuple[PreTrainedModel, Tokenizer] | None:
    """Takes the cached model if it is this one, else None; empties the cache in both cases."""
    found = _kept.pop(identity, None)
    _kept.clear()
    return found


def keep(identity: str, loaded: tuple[PreTrainedModel, Tokenizer]) -> tuple[PreTrainedModel, Tokenizer]:
    """Caches what was loaded and returns a copy; caches nothing if memory is short or a copy might differ."""
    if not (_is_plain(loaded[0]) and _fits_again(loaded[0])):
        return loaded
    _kept[identity] = loaded
    return copied(loaded[0]), copy.deepcopy(loaded[1])


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in new memory; weights that were tied are tied again."""
    weights: dict[int, Tensor] = {id(p): nn.Parameter(_copy(p.data), p.requires_grad) for p in model.parameters()}
    weights |= {id(b): _copy(b) for b in model.buffers()}
    return copy.deepcopy(model, weights)


def _copy(x: Tensor) -> Tensor:
    """A copy with the same offset in a cache line: products may be rounded differently at another offset."""
    if x.device.type != "cpu" or not x.is_contiguous() or x.data_ptr() % x.itemsize:
        return x.clone()
    memory = torch.empty(x.nbytes + CACHE_LINE, dtype=torch.uint8)
    start = (x.data_ptr() - memory.data_ptr()) % CACHE_LINE
    return memory[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether the model has only modules of transformers and torch, and ordinary tensors."""
    own = all(type(module).__module__.partition(".")[0] in ("transformers", "torch") for module in model.modules())
    return own and getattr(model, "hf_quantizer", None) is None


def _fits_again(model: PreTrainedModel) -> bool:
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return FREE_MODELS * size <= host_memory.free_host_bytes()
