"""A quantised matrix without its zeros: codes, an index and scales, of which the same values come back to the bit.

Tensors on disk by the ending of their names (sizes in grid_sizes.py): `codes` (every row's kept values as one stream of
bits), `index` as of a matrix without a grid, `scales` (their bytes), `zeros` (codes of zero, a stream per row), for
outliers `salient_index` with `salient_values` (16 bits) or `salient_codes`. Columns stand in the order in which groups
are cut.

Shapes: O outputs, I inputs, K kept values of a row, S outliers of a row, G groups of a row, C columns of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esparse.kernels.form import packed_bits, unpacked_bits
from esparse.packed import codes, matrix
from esparse.packed.matrix import PackedMatrix
from esparse.patterns import Pattern
from esparse.quantise import Scales
from esparse.quantise.grids import Grid


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedMatrix:
    """A quantised matrix in its form in memory, from which products are computed; columns are in group order.

    `codes_OB` and `scales_OB` are as on disk: scales as bytes, so that nobody changes their precision. `bits_OB` says
    which weights are kept; None if all are. Zero points and codes of outliers take a byte each.
    """

    pattern: Pattern
    inputs: int
    grid: Grid
    codes_OB: Tensor
    scales_OB: Tensor
    zeros_OG: Tensor | None = None
    bits_OB: Tensor | None = None
    outlier_values_OS: Tensor | None = None
    outlier_codes_OS: Tensor | None = None
    outlier_places_OS: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by the names that a layer gives them."""
        found = {
            "codes": self.codes_OB,
            "scales": self.scales_OB,
            "zeros": self.zeros_OG,
            "bits": self.bits_OB,
            "salient_values": self.outlier_values_OS,
            "salient_codes": self.outlier_codes_OS,
            "salient_places": self.outlier_places_OS,
        }
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], pattern: Pattern, inputs: int, grid: Grid) -> QuantisedMatrix:
        """The inverse of `tensors`."""
        first = (tensors["codes"], tensors["scales"])
        others = ("zeros", "bits", "salient_values", "salient_codes", "salient_places")
        return cls(pattern, inputs, grid, *first, *(tensors.get(name) for name in others))

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors().values())

    @property
    def kept(self) -> int:
        """Weights of a row that have a code, without outliers."""
        return self.pattern.parts()[0].kept_per_row(self.inputs) if self.pattern.parts() else self.inputs

    @property
    def scale_OG(self) -> Tensor:
        """The scales in the precision in which they are stored."""
        return self.scales_OB.view(getattr(torch, self.grid.scale))

    def rows(self, part: slice) -> QuantisedMatrix:
        """Some of its rows."""
        cut = {name: value[part] for name, value in self.tensors().items()}
        return QuantisedMatrix.of(cut, self.pattern, self.inputs, self.grid)

    def dense(self, first: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows from `first` to before `end`, dense: the values of the grid, rounded to that precision."""
        of = self.rows(slice(first, end))
        values_OK = unstream(of.codes_OB, of.kept, of.grid.code_bits)
        scales = _of_columns(Scales(of.scale_OG.float(), of.zeros_OG), of.inputs)
        if of.bits_OB is None:
            return _values(values_OK, None, of.grid, scales, dtype)
        keep_OI = unpacked_bits(of.bits_OB, of.inputs)
        columns_OK = keep_OI.nonzero()[:, 1].view(values_OK.shape)
        kept_OK = _values(values_OK, columns_OK, of.grid, scales, dtype)
        weight_OI = kept_OK.new_zeros(keep_OI.shape).masked_scatter_(keep_OI, kept_OK)
        if of.outlier_places_OS is not None:
            starts_S = matrix.starts(of.pattern.parts()[1], of.inputs, keep_OI.device)
            columns_OS = of.outlier_places_OS.long() + starts_S
            found = of.outlier_values_OS
            if of.outlier_codes_OS is not None:
                found = _values(of.outlier_codes_OS, columns_OS, of.grid, scales, dtype)
            assert found is not None
            weight_OI.scatter_add_(1, columns_OS, found.to(dtype))
        return weight_OI


def to_file(weight_OI: Tensor, pattern: Pattern, grid: Grid, scales: Scales) -> dict[str, Tensor]:
    """The tensors that stand for the matrix. Raises ValueError if a value is not on the grid or breaks the pattern."""
    inputs = weight_OI.shape[1]
    tensors = {"scales": _scale_bytes(scales.scale_OG, grid)}
    if scales.zero_OG is not None:
        tensors["zeros"] = stream(scales.zero_OG, grid.zero_bits)
    if pattern.parts():
        tensors |= _placed(weight_OI, pattern, grid, scales)
    else:
        tensors["codes"] = stream(_codes(weight_OI, grid, scales), grid.code_bits)
    again = from_file(tensors, pattern, inputs, grid)
    if not torch.equal(again.dense(dtype=weight_OI.dtype), weight_OI):
        raise ValueError(f"its values do not lie on the grid of {grid.code_bits} bits, or do not hold {pattern}")
    return {name: value.contiguous() for name, value in tensors.items()}


def _placed(weight_OI: Tensor, pattern: Pattern, grid: Grid, scales: Scales) -> dict[str, Tensor]:
    """The codes of kept weights, and the index; of outliers likewise."""
    inputs = weight_OI.shape[1]
    placed_OI, *salient = _split(weight_OI, pattern, scales.whole_OI)
    taken = _taken(_codes(weight_OI, grid, scales), placed_OI)
    tensors = {"codes": stream(taken, grid.code_bits)}
    shell = PackedMatrix(pattern, inputs, taken, packed_bits(placed_OI))
    if salient:
        places_OS = salient[0].nonzero()[:, 1].view(len(weight_OI), -1) - matrix.starts(pattern.parts()[1], inputs)
        shell = replace(shell, outlier_values_OS=taken, outlier_places_OS=places_OS)
        # With few nonzeros, some places chosen for outliers are also places of the base: they get the value 0.
        others_OI = weight_OI.masked_fill(placed_OI, 0)
        if scales.whole_OI is None:
            tensors["salient_codes"] = stream(_taken(_codes(others_OI, grid, scales), salient[0]), grid.code_bits)
        else:
            tensors["salient_values"] = _half(_taken(others_OI, salient[0]))
    return tensors | {name: value for name, value in matrix.to_file(shell).items() if name.endswith("index")}


def from_file(tensors: Mapping[str, Tensor], pattern: Pattern, inputs: int, grid: Grid) -> QuantisedMatrix:
    """The matrix that `to_file` was given; ValueError for damaged tensors."""
    groups = inputs // grid.columns(inputs)
    of = QuantisedMatrix(pattern, inputs, grid, tensors["codes"].contiguous(), tensors["scales"].contiguous())
    if not bool((torch.isfinite(of.scale_OG) & (of.scale_OG > 0)).all()):
        raise ValueError("a scale is not a positive number: the file is damaged")
    _check_codes(of.codes_OB, grid)
    if grid.zero_bits:
        of = replace(of, zeros_OG=unstream(tensors["zeros"], groups, grid.zero_bits))
    if not pattern.parts():
        return of
    _, *outliers = pattern.parts()
    # The index is read by what reads it without a grid, which wants values beside it.
    shell = {name: value for name, value in tensors.items() if name.endswith("index")} | {"values": of.codes_OB}
    index = matrix.from_file(shell, pattern, inputs)
    of = replace(of, bits_OB=index.bits_OB, outlier_places_OS=index.outlier_places_OS)
    if not outliers:
        return of
    if grid.outlier_bits is not None:
        matrix.check_finite("salient_values", tensors["salient_values"])
        return replace(of, outlier_values_OS=tensors["salient_values"])
    codes_OS = unstream(tensors["salient_codes"], outliers[0].kept_per_row(inputs), grid.code_bits)
    _check_codes(codes_OS, grid)
    return replace(of, outlier_codes_OS=codes_OS)


def _check_codes(codes_OK: Tensor, grid: Grid) -> None:
    """Raises ValueError for codes that stand for NaN: fp8 has some, and a byte for each code."""
    levels = grid.levels()
    for code in () if levels is None else (~levels.isfinite()).nonzero().flatten().tolist():
        if bool((codes_OK == code).any()):
            raise ValueError(f"one of its codes is {code}, which stands for no number: the file is damaged")


def _codes(weight_OI: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """The codes whose values, rounded to the weights' precision, are these weights."""
    of_columns = _of_columns(scales, weight_OI.shape[1])
    codes_OI = grid.codes(weight_OI.float(), *of_columns)
    # bfloat16 holds eight bits of a value: of a weight more than 128 scales from zero the nearest code may be the one
    # beside its own, and at a power of two, where the precision halves, that one's value is rounded to another weight.
    off_OI = grid.values(codes_OI, *of_columns).to(weight_OI.dtype) != weight_OI
    for step in (1, -1) if bool(off_OI.any()) else ():
        beside_OI = (codes_OI.int() + step).clamp_(0, 2**grid.code_bits - 1).to(torch.uint8)
        hits_OI = off_OI & (grid.values(beside_OI, *of_columns).to(weight_OI.dtype) == weight_OI)
        codes_OI, off_OI = torch.where(hits_OI, beside_OI, codes_OI), off_OI & ~hits_OI
    return codes_OI


def _scale_bytes(scale_OG: Tensor, grid: Grid) -> Tensor:
    return scale_OG.to(getattr(torch, grid.scale)).contiguous().view(torch.uint8)


def stream(codes_OK: Tensor, bits: int) -> Tensor:
    """Every row's codes (uint8) as bytes, one code behind the other, the lowest bit first; each row is filled."""
    rows, count = codes_OK.shape
    eights = torch.nn.functional.pad(codes_OK, (0, -count % 8)).long()
    return codes.to_bytes(eights.view(-1), bits).view(rows, -1)[:, : -(-count * bits // 8)].contiguous()


def unstream(bytes_OB: Tensor, count: int, bits: int) -> Tensor:
    """The codes (uint8) that `stream` was given."""
    whole = -(-count // 8) * bits
    filled_OB = torch.nn.functional.pad(bytes_OB, (0, whole - bytes_OB.shape[1]))
    found = codes.from_bytes(filled_OB.reshape(-1), len(bytes_OB) * whole * 8 // bits, bits)
    return found.view(len(bytes_OB), -1)[:, :count].to(torch.uint8)


def _split(weight_OI: Tensor, pattern: Pattern, whole_OI: Tensor | None) -> list[Tensor]:
    """What of the matrix stands in each part of the pattern; every part is full, with zeros where too few are kept."""
    if whole_OI is None:
        return pattern.split(weight_OI != 0)
    base, outliers = pattern.parts()
    placed_OI = base.keep_top(((weight_OI != 0).float() + 1).masked_fill(whole_OI, 0.0))
    return [placed_OI, outliers.keep_top((whole_OI.float() + 1).masked_fill(placed_OI, 0.0))]


def _taken(x_OI: Tensor, keep_OI: Tensor) -> Tensor:
    return x_OI.masked_select(keep_OI).view(len(x_OI), -1)


def _of_columns(scales: Scales, inputs: int) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every column."""
    columns = inputs // scales.scale_OG.shape[1]
    zero_OG = scales.zero_OG
    return scales.scale_OG.repeat_interleave(columns, 1), (
        None if zero_OG is None else zero_OG.repeat_interleave(columns, 1)
    )


def _values(
    codes_OK: Tensor, columns_OK: Tensor | None, grid: Grid, scales: tuple[Tensor, Tensor | None], dtype: torch.dtype
) -> Tensor:
    """The values of codes that stand in these columns; None: in all."""
    scale_OK, zero_OK = (x if x is None or columns_OK is None else x.gather(1, columns_OK) for x in scales)
    assert scale_OK is not None
    return grid.values(codes_OK, scale_OK, zero_OK).to(dtype) + 0.0  # no -0.0


def _half(weight: Tensor) -> Tensor:
    return weight if weight.dtype.itemsize == 2 else weight.half()
