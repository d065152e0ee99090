"""Holds a block's inputs between the two passes of its statistics.

Shapes: T tokens of one micro-batch, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esparse.models import host_memory
from esparse.models.activations import Activations
from esparse.models.matrices import version
from esparse.stats import Statistic

# Bytes on a GPU, if hidden states wait elsewhere so as to spare its memory: a LLaMA-7B's block stays below 6 GB with
# them, and the inputs of a small model fit in.
MOST_BESIDE_HOST = 2 * 2**30


class InputCache:
    """Keeps a block's inputs from the first pass to the second, in whole micro-batches, as far as memory allows."""

    def __init__(self, budget: int) -> None:
        """`budget`: bytes."""
        self._left = budget
        self._full = False
        self._batch: int | None = None
        self._held: dict[int, list[tuple[Tensor, int, Statistic]]] = {}
        self._memory: set[int] = set()  # addresses of what was counted: inputs may be parts of one tensor

    def begin(self, batch: int) -> None:
        """What is added from now on belongs to this micro-batch."""
        self._batch = None if self._full else batch
        if self._batch is not None:
            self._held[batch] = []

    def add(self, x_TI: Tensor, statistic: Statistic) -> None:
        if self._batch is None:
            return
        memory = x_TI.untyped_storage()
        if memory.data_ptr() not in self._memory:
            self._memory.add(memory.data_ptr())
            self._left -= memory.nbytes()
        if self._left < 0:
            del self._held[self._batch]
            self._batch, self._full = None, True
        else:
            self._held[self._batch].append((x_TI, version(x_TI), statistic))

    def take(self) -> tuple[set[int], dict[Statistic, list[Tensor]]]:
        """The micro-batches whose inputs are all there as they were read, and these inputs; forgets them.

        A micro-batch is missing if memory was short, or if the block has overwritten an input of a layer.
        """
        held, self._held = self._held, {}
        whole = {
            batch: parts for batch, parts in held.items() if all(version(x_TI) == before for x_TI, before, _ in parts)
        }
        inputs: dict[Statistic, list[Tensor]] = {}
        for parts in whole.values():
            for x_TI, _, statistic in parts:
                inputs.setdefault(statistic, []).append(x_TI)
        return set(whole), inputs


def budget(activations: Activations) -> int:
    """How many bytes of inputs a block may hold, for these hidden states."""
    blocks = activations.blocks
    waits = {hidden.device.type for hidden in activations.hidden}
    return room(
        host_memory.free_bytes(blocks.device), blocks.device, beside_host=waits == {"cpu"}, ranks=blocks.ranks.size
    )


def room(free: int, device: torch.device, *, beside_host: bool, ranks: int) -> int:
    """How many of the device's free bytes inputs may take; `beside_host`: hidden states wait on the host or the disk.

    Whoever leaves them there wants to spare the GPU: the inputs of all tokens are several times as large.
    """
    if device.type == "cpu":
        return free // 4 // ranks  # the ranks share the host's memory
    return min(free // 4, MOST_BESIDE_HOST) if beside_host else free // 4
