"""The pattern that removes nothing: what a pruned model is compared with, and where quantisation stands alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.patterns.nm import Pattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dense(Pattern):
    """Every weight survives."""

    def __str__(self) -> str:
        return "dense"

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        import torch

        return torch.ones_like(scores_OI, dtype=torch.bool)

    def holds(self, keep_OI: Tensor) -> bool:
        return True

    def metadata_bits(self, outputs: int, inputs: int) -> int:
        return 0
