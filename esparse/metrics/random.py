"""Random scores: the control that every metric must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

from esparse.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import LayerStats


@dataclass(kw_only=True, slots=True)
class Random(Metric):
    """Uniform scores that depend only on the seed and the layer's name."""

    seed: int  # of the scores

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        import torch

        # A CPU generator uses only 32 bits of its seed, so both go through one hash.
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {stats.name}".encode()))
        return torch.rand(weight_OI.shape, generator=generator, dtype=torch.float32).to(weight_OI.device)
