"""The hidden states of all sequences on their way through the blocks.

Shapes: S sequences, B sequences of a micro-batch, L tokens of a sequence, H hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from esparse.linalg import all_finite
from esparse.models.blocks import BlockModel, Call
from esparse.errors import Mistake


class Activations:
    """The hidden states of all sequences on their way; between blocks they are where the keeper has them.

    A micro-batch holds at most `sequences_at_once` sequences, where that is given.
    """

    def __init__(self, blocks: BlockModel, tokens_SL: Tensor, sequences_at_once: int | None = None) -> None:
        self.blocks = blocks
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        self._keep: Callable[[Tensor], Tensor] | None = None
        with blocks.ends_resident():
            for tokens_BL in blocks.micro_batches(tokens_SL, sequences_at_once):
                hidden_BLH, calls = blocks.embed(tokens_BL)
                if self._keep is None:
                    size = hidden_BLH[0].nbytes * len(tokens_SL)
                    self._keep = blocks.keeper.choose(size * blocks.ranks.size)  # which take as much of one host
                self.hidden.append(self._keep(hidden_BLH))
                host = [call.to(torch.device("cpu")) for call in calls]
                # Masks and positions are the same for every full micro-batch: one copy is enough.
                if self._calls:
                    host = [_same(first, call) for first, call in zip(self._calls[0], host, strict=True)]
                self._calls.append(host)

    def observe(self, index: int) -> None:
        """Runs a block over all micro-batches for those who watch; the hidden states stay as they are."""
        for batch in range(len(self.hidden)):
            self.run(index, batch)

    @torch.no_grad()
    def run(self, index: int, batch: int) -> Tensor:
        """What a block makes of one micro-batch, on the device; the hidden states stay as they are."""
        return self.forward(index, batch)

    def forward(self, index: int, batch: int, dtype: torch.dtype | None = None) -> Tensor:
        """As `run`, but differentiable; for a block that was cast to `dtype`."""
        return self.blocks.forward(index, self.hidden[batch], self._calls[batch][index], dtype)

    def advance(self, index: int) -> None:
        """Replaces the hidden states by what the block makes of them; raises as `advanced` does."""
        for batch, out in enumerate(self._outputs(index)):
            self.hidden[batch] = out

    def advanced(self, index: int) -> list[Tensor]:
        """What the block makes of the hidden states, which stay as they are.

        Raises ValueError where it is no longer finite.
        """
        return list(self._outputs(index))

    def _outputs(self, index: int) -> Iterator[Tensor]:
        for batch in range(len(self.hidden)):
            out = self.run(index, batch)
            if not all_finite(out):
                raise Mistake(
                    f"the output of {self.blocks.prefix}.{index} holds NaN or Inf; where the model is in float16, try "
                    "model.dtype=bfloat16 or float32, otherwise its weights are damaged"
                )
            assert self._keep is not None
            yield self._keep(out)

    def fits(self, hidden: list[Tensor]) -> bool:
        """Whether these could be the hidden states, by micro-batch."""
        mine = [(h.shape, h.dtype) for h in self.hidden]
        return mine == [(h.shape, h.dtype) for h in hidden]

    def put(self, hidden: list[Tensor]) -> None:
        """Goes on with these hidden states."""
        assert self._keep is not None
        self.hidden = [self._keep(h.to(self.blocks.device)) for h in hidden]

    def twin(self) -> Activations:
        """Another stream that begins with the same hidden states."""
        twin = copy.copy(self)
        twin.hidden = list(self.hidden)
        return twin


def _same(first: Any, other: Any) -> Any:
    """`first` where both hold the same values, else `other`."""
    if isinstance(other, Call):
        return Call(_same(first.args, other.args), _same(first.kwargs, other.kwargs))
    if isinstance(other, Tensor):
        equal = isinstance(first, Tensor) and first.shape == other.shape and torch.equal(first, other)
        return first if equal else other
    if isinstance(other, tuple | list) and len(first) == len(other):
        return type(other)(_same(f, o) for f, o in zip(first, other, strict=True))
    if isinstance(other, dict):
        return {k: _same(first.get(k), v) for k, v in other.items()}
    return other
