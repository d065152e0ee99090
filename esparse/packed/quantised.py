"""A quantised matrix on disk: codes, an index and scales, of which the same values come back to the bit.

Tensors by the ending of their names (sizes in grid_sizes.py): `codes` (every row's kept values as one stream of bits),
`index` as of a matrix without a grid, `scales` (their bytes), `zeros` (codes of zero, a stream per row), for outliers
`salient_index` with `salient_values` (16 bits) or `salient_codes`. Columns stand in the order in which groups are cut.

Shapes: O outputs, I inputs, K kept values of a row, S outliers of a row, G groups of a row, C columns of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from esparse.kernels.form import packed_bits, unpacked_bits
from esparse.packed import codes, matrix
from esparse.packed.matrix import PackedMatrix
from esparse.patterns import Pattern
from esparse.quantise import Scales
from esparse.quantise.grids import Grid


def to_file(weight_OI: Tensor, pattern: Pattern, grid: Grid, scales: Scales) -> dict[str, Tensor]:
    """The tensors that stand for the matrix. Raises ValueError if a value is not on the grid or breaks the pattern."""
    inputs = weight_OI.shape[1]
    placed_OI, *salient = _split(weight_OI, pattern, scales.whole_OI)
    codes_OI = grid.codes(weight_OI.float(), *_of_columns(scales, inputs))
    taken = _taken(codes_OI, placed_OI)
    tensors = {"codes": stream(taken, grid.code_bits), "scales": _scale_bytes(scales.scale_OG, grid)}
    if scales.zero_OG is not None:
        tensors["zeros"] = stream(scales.zero_OG, grid.zero_bits)
    shell = PackedMatrix(pattern, inputs, taken, packed_bits(placed_OI))
    if salient:
        places_OS = salient[0].nonzero()[:, 1].view(len(weight_OI), -1) - matrix.starts(pattern.parts()[1], inputs)
        shell = replace(shell, outlier_values_OS=taken, outlier_places_OS=places_OS)
        if scales.whole_OI is None:
            tensors["salient_codes"] = stream(_taken(codes_OI, salient[0]), grid.code_bits)
        else:
            tensors["salient_values"] = _half(_taken(weight_OI, salient[0]))
    tensors |= {name: value for name, value in matrix.to_file(shell).items() if name.endswith("index")}
    again = from_file(tensors, pattern, inputs, grid, weight_OI.dtype)
    if not torch.equal(again.dense(), weight_OI):
        raise ValueError(f"its values do not lie on the grid of {grid.code_bits} bits, or do not hold {pattern}")
    return {name: value.contiguous() for name, value in tensors.items()}


def from_file(
    tensors: Mapping[str, Tensor], pattern: Pattern, inputs: int, grid: Grid, dtype: torch.dtype
) -> PackedMatrix:
    """The matrix that `to_file` was given, with its values in that precision; ValueError for damaged tensors."""
    base, *outliers = pattern.parts()
    groups = inputs // grid.columns(inputs)
    scale_OG = tensors["scales"].contiguous().view(getattr(torch, grid.scale)).float()
    if not bool((torch.isfinite(scale_OG) & (scale_OG > 0)).all()):
        raise ValueError("a scale is not a positive number: the file is damaged")
    zero_OG = unstream(tensors["zeros"], groups, grid.zero_bits) if grid.zero_bits else None
    scales = _of_columns(Scales(scale_OG, zero_OG), inputs)
    kept = {"values": unstream(tensors["codes"], base.kept_per_row(inputs), grid.code_bits), "index": tensors["index"]}
    if outliers:
        kept["salient_index"] = tensors["salient_index"]
        kept["salient_values"] = tensors.get("salient_values", scale_OG)
    packed = matrix.from_file(kept, pattern, inputs)
    columns_OK = unpacked_bits(packed.bits_OB, inputs).nonzero()[:, 1].view(packed.values_OK.shape)
    packed = replace(packed, values_OK=_values(packed.values_OK, columns_OK, grid, scales, dtype))
    if not outliers:
        return packed
    assert packed.outlier_places_OS is not None and packed.outlier_values_OS is not None
    if grid.outlier_bits is not None:
        return replace(packed, outlier_values_OS=packed.outlier_values_OS.to(dtype))
    codes_OS = unstream(tensors["salient_codes"], outliers[0].kept_per_row(inputs), grid.code_bits)
    columns_OS = packed.outlier_places_OS.long() + matrix.starts(outliers[0], inputs)
    return replace(packed, outlier_values_OS=_values(codes_OS, columns_OS, grid, scales, dtype))


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
    codes_OK: Tensor, columns_OK: Tensor, grid: Grid, scales: tuple[Tensor, Tensor | None], dtype: torch.dtype
) -> Tensor:
    scale_OI, zero_OI = scales
    zero_OK = None if zero_OI is None else zero_OI.gather(1, columns_OK)
    return grid.values(codes_OK, scale_OI.gather(1, columns_OK), zero_OK).to(dtype) + 0.0  # no -0.0


def _half(weight: Tensor) -> Tensor:
    return weight if weight.dtype.itemsize == 2 else weight.half()
