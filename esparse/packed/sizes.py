"""Counts the bytes of dense and packed matrices on tensors of the meta device, which take no memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from esparse.packed import grid_sizes, matrix
from esparse.patterns import Pattern
from esparse.quantise.grids import Grid

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


def of_codes(pattern: Pattern, outputs: int, inputs: int, dtype: torch.dtype, grid: Grid) -> Saving:
    """Bytes of one quantised matrix, whose outliers may have that dtype; the pattern may also be dense.

    Raises Mistake if the grid's groups do not divide the inputs.
    """
    shapes = grid_sizes.file_shapes(pattern, outputs, inputs, grid)
    in_memory = sum(outputs * shape[1] for name, shape in shapes.items() if name in ("codes", "scales"))
    in_memory += outputs * (inputs // grid.columns(inputs)) if grid.zero_bits else 0
    if pattern.parts():
        in_memory += outputs * -(-inputs // 8)
        other_bytes = dtype.itemsize if grid.outlier_bits is not None else 1
        for outliers in pattern.parts()[1:]:
            place_bytes = 1 if outliers.m <= 256 else 4
            in_memory += outputs * outliers.kept_per_row(inputs) * (other_bytes + place_bytes)
    on_disk = grid_sizes.file_bytes(pattern, outputs, inputs, grid)
    return Saving(outputs * inputs * dtype.itemsize, in_memory, on_disk)
