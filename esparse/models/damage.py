"""Says why values that a model computes are NaN or Inf: by a weight of its own, or by what it computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esparse.errors import Mistake
from esparse.linalg import all_finite

if TYPE_CHECKING:
    from esparse.models.blocks import BlockModel

Named = Iterable[tuple[str, Tensor]]


def damaged(name: str, weights: Tensor) -> str:
    """The sentence about a tensor with weights that are NaN or Inf."""
    bad = int((~torch.isfinite(weights)).sum())
    why = "the checkpoint is damaged"
    if weights.dtype == torch.float16:
        why += ", or they are too large for float16 (set model.dtype=bfloat16 or float32)"
    return f"{name} holds {bad} weights that are NaN or Inf: {why}"


def not_finite(what: str, weights: Named) -> Mistake:
    """The Mistake for computed values that are NaN or Inf, where these weights computed them.

    `what`: a beginning of a sentence, such as "the output of NAME holds NaN or Inf".
    """
    half = False
    for name, weight in weights:
        if weight.is_meta or not weight.is_floating_point():
            continue
        if not all_finite(weight):
            return Mistake(damaged(name, weight))
        half = half or weight.dtype == torch.float16
    if half:
        return Mistake(f"{what}: float16 overflows at 65,504, so set model.dtype=bfloat16 or float32")
    return Mistake(f"{what}, though no weight there does: they overflow, so some weights are damaged or far too large")


def of_block(blocks: BlockModel, index: int) -> Mistake:
    """`not_finite` for the output of a block, which is resident."""
    name = blocks.name(index)
    named = ((f"{name}.{own}", weight) for own, weight in blocks.blocks[index].named_parameters())
    return not_finite(f"the output of {name} holds NaN or Inf", named)


def of_ends(blocks: BlockModel, what: str) -> Mistake:
    """`not_finite` for what is computed before the first block or behind the last one."""
    with blocks.ends_resident():
        everything = blocks.model.named_parameters()
        return not_finite(what, ((n, w) for n, w in everything if not n.startswith(f"{blocks.prefix}.")))
