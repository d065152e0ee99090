"""One model as it was loaded, kept for the next run of this process that prunes the same one.

Every run gets weights, buffers, configuration and tokenizer of its own, whatever runs before it did to theirs: what is
kept is only ever copied, or handed over to the last run that wants it.
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

ROOM = 3  # times the model's bytes that have to be free for one more copy of it
CACHE_LINE = 64  # bytes

# At most one, by all that says which model it is.
_kept: dict[str, tuple[PreTrainedModel, Tokenizer]] = {}


def take(identity: str) -> tuple[PreTrainedModel, Tokenizer] | None:
    """The model that was kept under this name, None where it was another one; none is kept any more."""
    found = _kept.pop(identity, None)
    _kept.clear()
    return found


def keep(identity: str, loaded: tuple[PreTrainedModel, Tokenizer]) -> tuple[PreTrainedModel, Tokenizer]:
    """Keeps what was loaded and returns a copy; where memory is scarce, or a copy might differ, nothing is kept."""
    if not (_is_plain(loaded[0]) and _fits_again(loaded[0])):
        return loaded
    _kept[identity] = loaded
    return copied(loaded[0]), copy.deepcopy(loaded[1])


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with memory of its own; what was one weight under several names is one again."""
    weights: dict[int, Tensor] = {id(p): nn.Parameter(_copy(p.data), p.requires_grad) for p in model.parameters()}
    weights |= {id(b): _copy(b) for b in model.buffers()}
    return copy.deepcopy(model, weights)


def _copy(x: Tensor) -> Tensor:
    """Begins at the same place of a cache line: a product of the same values elsewhere may be rounded otherwise."""
    if x.device.type != "cpu" or not x.is_contiguous() or x.data_ptr() % x.itemsize:
        return x.clone()
    memory = torch.empty(x.nbytes + CACHE_LINE, dtype=torch.uint8)
    start = (x.data_ptr() - memory.data_ptr()) % CACHE_LINE
    return memory[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether it is made of nothing but transformers' own modules and ordinary tensors."""
    own = all(type(module).__module__.partition(".")[0] in ("transformers", "torch") for module in model.modules())
    return own and getattr(model, "hf_quantizer", None) is None


def _fits_again(model: PreTrainedModel) -> bool:
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return ROOM * size <= host_memory.free_host_bytes()
