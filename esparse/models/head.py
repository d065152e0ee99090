"""The head of a model: the module whose output are its logits, so that they can be computed part by part.

The logits of a whole sequence may be many times as large as its hidden states. Shapes: B sequences, L tokens, H hidden
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esparse.models.activations import tokens_at_once

TRIED = 8  # tokens by which it is tried what a head does
LARGE = 64  # times their hidden states: small logits pass a cap unchanged, but for their last bits


@torch.no_grad()
def plain_head(model: Any, tokens_BL: Tensor) -> nn.Module | None:
    """The module whose output are the logits of the tokens that it is given; None if something comes behind it.

    It is tried on the first tokens, which lie on the model's device.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        return None
    tokens_BL = tokens_BL[:1, :TRIED]
    with entering(head, lambda hidden_BLH: LARGE * hidden_BLH) as entered:
        logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits
    if len(entered) != 1 or entered[0].shape[:2] != tokens_BL.shape:
        return None
    return head if torch.equal(head(LARGE * entered[0]), logits_BLV) else None


def hidden_states(head: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What enters the head (B x L x H) while the model runs, of whose logits it computes those of one token."""
    with entering(head, lambda hidden_BLH: hidden_BLH[:, :1]) as entered:
        run()
    return entered[0]


def parts(hidden_BLH: Tensor, vocabulary: int) -> Iterator[slice]:
    """The tokens whose logits are computed together, part by part."""
    sequences, length, _ = hidden_BLH.shape
    step = tokens_at_once(hidden_BLH.device, sequences, vocabulary)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@contextmanager
def entering(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """While open, records what enters the head, and lets it have something else."""
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:  # called by keyword: `plain_head` then finds nothing that entered
            return None
        entered.append(args[0])
        return (change(args[0]), *args[1:])

    hook = head.register_forward_pre_hook(enter)
    try:
        yield entered
    finally:
        hook.remove()
