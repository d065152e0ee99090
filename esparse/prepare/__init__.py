"""Preparations: what is done to a block before it is scored, without changing what it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esparse.models.block import Block


@dataclass(kw_only=True, slots=True)
class Prepare(ABC):
    """Rewrites a block's weights so that they prune better; the block's function stays the same."""

    @abstractmethod
    def block(self, block: Block) -> None:
        """Prepares one block, which is on the device."""


@dataclass(kw_only=True, slots=True)
class NoPreparation(Prepare):
    """The weights as they are."""

    def block(self, block: Block) -> None:
        return None
