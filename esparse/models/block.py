"""One decoder block on the device with its inputs, as preparations and recoveries get it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from esparse.models.activations import Activations
from esparse.models.matrices import BlockMatrices


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block, its inputs, and the inputs it would have if no block before it were pruned."""

    index: int
    activations: Activations  # the inputs, from the pruned blocks before it
    dense: Activations | None  # the inputs from dense blocks; None unless the recovery asks for them
    skip: Sequence[str]  # regular expressions of layer names that stay dense
    seed: int

    @property
    def name(self) -> str:
        return f"{self.activations.blocks.prefix}.{self.index}"

    @property
    def module(self) -> nn.Module:
        return self.activations.blocks.blocks[self.index]

    def matrices(self) -> BlockMatrices:
        """The block's prunable matrices; their input groups are unknown until observed."""
        return BlockMatrices(self.module, self.name, self.skip, self.activations.blocks.routers)
