"""One decoder block on the device, with what flows into it: what a preparation or a recovery works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from esparse.models.activations import Activations
from esparse.models.matrices import BlockMatrices


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block, the hidden states that enter it, and those that would enter it if no block before it were pruned."""

    index: int
    activations: Activations  # what the pruned blocks before it return
    dense: Activations | None  # what the dense ones would return; None where nobody asked for it
    skip: Sequence[str]  # regular expressions of layer names that stay dense
    seed: int

    @property
    def name(self) -> str:
        return f"{self.activations.blocks.prefix}.{self.index}"

    @property
    def module(self) -> nn.Module:
        return self.activations.blocks.blocks[self.index]

    def matrices(self) -> BlockMatrices:
        """The block's prunable matrices; its input groups are still to be observed."""
        return BlockMatrices(self.module, self.name, self.skip, self.activations.blocks.routers)
