"""A pruned matrix without its zeros: its form in memory, for computing, and its form on disk.

In memory every row has the same number of kept weights: `values` (O x K, in column order) and `bits` (O x ceil(I / 8),
uint8), in which bit i (of value 2^i) of byte j is 1 if column 8 j + i is kept. Outliers are stored apart:
`salient_values` (O x S), and for each its place in its run of 256 columns (`salient_places`, uint8; int32 for longer
runs). The matrix is the sum of both. (The format says "salient" for outliers.)

On disk the values stay the same, and an index says which weights are kept, in that one of three codes that takes the
fewest bits: the number of each group's choice (m <= 32; 0.75 bits per weight for 2:4, 0.875 for 4:8 and 8:16), the
places of the kept weights (7 bits each, 0.875 bits per weight for 16:128), or the bits. The whole groups of all rows
come first, then the shorter last groups (tails); each of the two parts is filled up to a byte.

Shapes: O outputs, I inputs, K kept weights of a row, S outliers, G groups, M weights of a group, B bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from esparse.kernels.form import packed_bits, unpacked_bits
from esparse.packed import codes
from esparse.parallel.cores import each_core
from esparse.patterns import NM, Pattern
from esparse.patterns.order import check_order

HOST = torch.device("cpu")
TILE = 2**18  # weights that are packed or unpacked at one time: the intermediate tensors stay in a core's cache


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A packed matrix in its form in memory."""

    pattern: Pattern
    inputs: int
    values_OK: Tensor
    bits_OB: Tensor
    outlier_values_OS: Tensor | None = None
    outlier_places_OS: Tensor | None = None

    @property
    def nbytes(self) -> int:
        parts = (self.values_OK, self.bits_OB, self.outlier_values_OS, self.outlier_places_OS)
        return sum(part.nbytes for part in parts if part is not None)

    def restored(self, order_I: Tensor) -> PackedMatrix:
        """The same matrix with other positions of its columns: column k becomes column `order_I[k]`.

        A group's columns are then no longer adjacent, but every row has as many kept weights as before. Raises
        ValueError for outliers, whose places count within a run of columns, and for an `order_I` that is no order.
        """
        check_order(order_I, self.inputs)
        if self.outlier_values_OS is not None:
            raise ValueError("columns cannot be reordered beside outliers, whose places count within runs of columns")
        back_I = torch.empty_like(order_I).scatter_(0, order_I, torch.arange(len(order_I)))
        values, bits = [], []
        for first in range(0, len(self.values_OK), 256):  # rows
            rows = slice(first, first + 256)
            keep_OI = unpacked_bits(self.bits_OB[rows], self.inputs)[:, back_I]
            values.append(self.dense(first, first + 256)[:, back_I].masked_select(keep_OI))
            bits.append(packed_bits(keep_OI))
        return replace(self, values_OK=torch.cat(values).view_as(self.values_OK), bits_OB=torch.cat(bits))

    def dense(self, first: int = 0, end: int | None = None) -> Tensor:
        """The rows from `first` to before `end`, dense."""
        rows = slice(first, end)
        keep_OI = unpacked_bits(self.bits_OB[rows], self.inputs)
        values_OK = self.values_OK[rows]
        weight_OI = values_OK.new_zeros(keep_OI.shape).masked_scatter_(keep_OI, values_OK)
        if self.outlier_values_OS is not None and self.outlier_places_OS is not None:
            outliers = self.pattern.parts()[1]
            columns_OS = self.outlier_places_OS[rows].long() + starts(outliers, self.inputs, keep_OI.device)
            weight_OI.scatter_add_(1, columns_OS, self.outlier_values_OS[rows])
        return weight_OI


def pack(weight_OI: Tensor, pattern: Pattern) -> PackedMatrix:
    """Packs a dense matrix; raises ValueError for nonzeros beyond the pattern, and for a pattern without groups."""
    if not pattern.parts():
        raise ValueError(f"the pattern {pattern} has no groups of n:m, in which weights could be packed")
    parts = _by_rows(lambda rows: _packed_rows(weight_OI[rows], pattern), *weight_OI.shape)
    return PackedMatrix(pattern, weight_OI.shape[1], *(torch.cat(part) for part in zip(*parts, strict=True)))


def _packed_rows(weight_OI: Tensor, pattern: Pattern) -> list[Tensor]:
    keep_OI = weight_OI != 0
    placed_OI, *outliers_OI = pattern.split(keep_OI)
    if (keep_OI & ~(placed_OI | outliers_OI[0] if outliers_OI else placed_OI)).any():
        raise ValueError(f"the weights do not hold {pattern}")
    packed = [_taken(weight_OI, placed_OI), packed_bits(placed_OI)]
    if outliers_OI:
        # With few nonzeros, some places chosen for outliers are also places of the base: they get the value 0.
        packed.append(_taken(weight_OI.masked_fill(placed_OI, 0), outliers_OI[0]))
        packed.append(_places(outliers_OI[0], pattern.parts()[1]))
    return packed


def _places(keep_OI: Tensor, pattern: NM) -> Tensor:
    """The place of each kept weight within its group."""
    columns_OS = keep_OI.nonzero()[:, 1].view(len(keep_OI), -1)
    return (columns_OS - starts(pattern, keep_OI.shape[1], keep_OI.device)).to(_place_type(pattern))


def _taken(weight_OI: Tensor, keep_OI: Tensor) -> Tensor:
    values_OK = weight_OI.masked_select(keep_OI).view(len(weight_OI), -1)
    return values_OK.masked_fill_(values_OK == 0, 0)  # no -0.0


def to_file(packed: PackedMatrix) -> dict[str, Tensor]:
    """The tensors of the matrix's form on disk, by the ending of their names."""
    base, *outliers = packed.pattern.parts()
    tensors = {"values": packed.values_OK}

    def kept(rows: slice) -> Tensor:
        return unpacked_bits(packed.bits_OB[rows], packed.inputs)

    def outliers_OI(rows: slice) -> Tensor:
        assert packed.outlier_places_OS is not None
        columns_OS = packed.outlier_places_OS[rows].long() + starts(outliers[0], packed.inputs)
        return torch.zeros(len(columns_OS), packed.inputs, dtype=torch.bool).scatter_(1, columns_OS, True)

    def index(mask: Callable[[slice], Tensor], pattern: NM) -> Tensor:
        parts = _by_rows(lambda rows: _index(mask(rows), pattern), len(packed.values_OK), packed.inputs)
        return torch.cat([piece for part in zip(*parts, strict=True) for piece in part])

    tensors["index"] = index(kept, base)
    if outliers:
        assert packed.outlier_values_OS is not None
        tensors |= {"salient_values": packed.outlier_values_OS, "salient_index": index(outliers_OI, outliers[0])}
    return tensors


def from_file(tensors: Mapping[str, Tensor], pattern: Pattern, inputs: int) -> PackedMatrix:
    """The inverse of `to_file`; ValueError if the index does not belong to this pattern, or values are not finite."""
    base, *outliers = pattern.parts()
    for name in (name for name in tensors if name.endswith("values")):
        check_finite(name, tensors[name])
    outputs = len(tensors["values"])

    def read(rows: slice) -> list[Tensor]:
        found = [packed_bits(_keep(tensors["index"], base, rows, outputs, inputs))]
        if outliers:
            found.append(_places(_keep(tensors["salient_index"], outliers[0], rows, outputs, inputs), outliers[0]))
        return found

    bits_OB, *places_OS = (torch.cat(part) for part in zip(*_by_rows(read, outputs, inputs), strict=True))
    return PackedMatrix(pattern, inputs, tensors["values"], bits_OB, tensors.get("salient_values"), *places_OS)


def check_finite(name: str, values: Tensor) -> None:
    """Raises ValueError for values of which one is NaN or Inf."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"a number of its {name} is NaN or Inf: the file is damaged")


def _by_rows(work: Callable[[slice], list[Tensor]], outputs: int, inputs: int) -> list[list[Tensor]]:
    """The results of `work` on slices of rows, computed on all cores.

    A slice has a multiple of eight rows, because their index takes whole bytes.
    """
    rows = max(8, TILE // inputs // 8 * 8)
    with each_core() as pool:
        return list(pool.map(work, (slice(start, min(start + rows, outputs)) for start in range(0, outputs, rows))))


def file_shapes(pattern: Pattern, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors on disk, by the ending of their names; an index counts in bytes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, part in zip(("", "salient_"), pattern.parts(), strict=False):
        shapes[f"{prefix}values"] = (outputs, part.kept_per_row(inputs))
        shapes[f"{prefix}index"] = (
            sum(-(-outputs * count * _way(n, m)[1] // 8) for count, n, m in part.groups(inputs)),
        )
    return shapes


def index_bits(part: NM, outputs: int, inputs: int) -> int:
    """Bits of the index of so many rows, before it is filled to bytes."""
    return sum(outputs * count * _way(n, m)[1] for count, n, m in part.groups(inputs))


def empty(pattern: Pattern, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> PackedMatrix:
    """A packed matrix with uninitialised tensors, for instance on the meta device to count its bytes."""
    base, *outliers = pattern.parts()
    values_OK = torch.empty(outputs, base.kept_per_row(inputs), dtype=dtype, device=device)
    bits_OB = torch.empty(outputs, -(-inputs // 8), dtype=torch.uint8, device=device)
    if not outliers:
        return PackedMatrix(pattern, inputs, values_OK, bits_OB)
    values_OS = torch.empty(outputs, outliers[0].kept_per_row(inputs), dtype=dtype, device=device)
    places_OS = torch.empty(values_OS.shape, dtype=_place_type(outliers[0]), device=device)
    return PackedMatrix(pattern, inputs, values_OK, bits_OB, values_OS, places_OS)


def _way(n: int, m: int) -> tuple[str, int]:
    """The code in which a group's choice is written (see the top of the module), and its bits."""
    if m <= codes.LONGEST:
        return "number", codes.code_bits(n, m)
    places = n * (m - 1).bit_length()
    return ("places", places) if places < m else ("bits", m)


def _index(keep_OI: Tensor, pattern: NM) -> list[Tensor]:
    """The index as bytes: of the whole groups, and of the tails."""
    parts, start = [], 0
    for count, n, m in pattern.groups(keep_OI.shape[1]):
        keep_NM = keep_OI[:, start : start + count * m].reshape(-1, m)
        start += count * m
        way, bits = _way(n, m)
        if way == "number":
            parts.append(codes.to_bytes(codes.numbers(codes.words(keep_NM), n, m), bits))
        elif way == "places":
            parts.append(codes.to_bytes(keep_NM.nonzero()[:, 1], bits // n))
        else:
            parts.append(packed_bits(keep_NM.reshape(1, -1))[0])
    return parts


def _keep(index_B: Tensor, pattern: NM, rows: slice, outputs: int, inputs: int) -> Tensor:
    """The keep mask of some rows, the first of which is a multiple of eight."""
    parts, start, taken = [], 0, rows.stop - rows.start
    for count, n, m in pattern.groups(inputs):
        bits = _way(n, m)[1]
        first = start + rows.start * count * bits // 8
        bytes_B = index_B[first : first + -(-taken * count * bits // 8)]
        start += -(-outputs * count * bits // 8)
        keep_NM = _groups(bytes_B, taken * count, n, m)
        if (keep_NM.sum(1, dtype=torch.int32) != n).any():
            raise ValueError(f"the index is damaged: it has choices that are not {n} of {m}")
        parts.append(keep_NM.view(taken, count * m))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _groups(bytes_B: Tensor, groups: int, n: int, m: int) -> Tensor:
    way, bits = _way(n, m)
    if way == "number":
        return codes.unworded(codes.choices(codes.from_bytes(bytes_B, groups, bits), n, m), m)
    if way == "places":
        places_NK = codes.from_bytes(bytes_B, groups * n, bits // n).view(groups, n)
        if bool((places_NK >= m).any()) or bool((places_NK.diff(dim=1) <= 0).any()):
            raise ValueError(f"the index is damaged: it has places that are not {n} of {m} in ascending order")
        return torch.zeros(groups, m, dtype=torch.bool).scatter_(1, places_NK, True)
    return unpacked_bits(bytes_B[None], groups * m).view(groups, m)


@lru_cache
def starts(pattern: NM, inputs: int, device: torch.device = HOST) -> Tensor:
    """For each kept weight of a row, the first column of its group.

    Copied to a device once: a copy waits for it, and a CUDA graph takes none.
    """
    if device != HOST:
        return starts(pattern, inputs).to(device)
    kept = [n for count, n, _ in pattern.groups(inputs) for _ in range(count)]
    return torch.tensor([cut.start for cut, n in zip(pattern.cuts(inputs), kept, strict=True) for _ in range(n)])


def _place_type(pattern: NM) -> torch.dtype:
    return torch.uint8 if pattern.m <= 256 else torch.int32
