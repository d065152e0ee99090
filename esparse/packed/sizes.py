"""Counts the bytes of dense and packed matrices on tensors of the meta device, which take no memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from esparse.packed import matrix
from esparse.patterns import Pattern

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Saving:
    """Bytes of a model or matrix: dense, packed in memory, packed on disk."""

    dense: int
    in_memory: int
    on_disk: int

    def __add__(self, other: Saving) -> Saving:
        return Saving(self.dense + other.dense, self.in_memory + other.in_memory, self.on_disk + other.on_disk)

    def __mul__(self, times: int) -> Saving:
        return Saving(self.dense * times, self.in_memory * times, self.on_disk * times)

    @property
    def share_in_memory(self) -> float:
        return 1 - self.in_memory / self.dense

    @property
    def share_on_disk(self) -> float:
        return 1 - self.on_disk / self.dense


@lru_cache
def of_matrix(pattern: Pattern, outputs: int, inputs: int, dtype: torch.dtype) -> Saving:
    """Bytes of one pruned matrix; the pattern must be n:m, or n:m with outliers."""
    dense = torch.empty(outputs, inputs, dtype=dtype, device=META)
    on_disk = sum(
        torch.empty(shape, dtype=torch.uint8 if name.endswith("index") else dtype, device=META).nbytes
        for name, shape in matrix.file_shapes(pattern, outputs, inputs).items()
    )
    return Saving(dense.nbytes, matrix.empty(pattern, outputs, inputs, dtype, META).nbytes, on_disk)
