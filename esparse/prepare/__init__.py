"""Preparations: rewrite a block's weights before scoring, without changing what the block computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esparse.models.block import Block


@dataclass(kw_only=True, slots=True)
class Prepare(ABC):
    """Base class of preparations: rewrites a block's weights so that they prune better; its function stays the same."""

    @abstractmethod
    def block(self, block: Block) -> None:
        """Prepares one block, which is on the device."""


@dataclass(kw_only=True, slots=True)
class NoPreparation(Prepare):
    """Changes nothing."""

    def block(self, block: Block) -> None:
        return None
