"""What a quantised matrix takes, to the bit: values, index, scales, zero points, outliers, and what fills bytes up.

On disk a row's codes are one stream of bits, filled to a byte, so that a row can be read by itself; likewise its zero
points. The index is that of a matrix without a grid (packed/matrix.py). Outliers are values of 16 bits, or codes.

Shapes: O outputs, I inputs, K kept values of a row, G groups of a row, S outliers of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from esparse.packed import matrix
from esparse.patterns import Pattern
from esparse.quantise.grids import Grid

PRECISION_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}
# What `stored_bits` counts, in the order of the record; orders belong to the inputs of several matrices.
PARTS = ("values", "index", "scales", "zero_points", "outliers", "padding", "orders")


def file_shapes(pattern: Pattern, outputs: int, inputs: int, grid: Grid) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors on disk, by the ending of their names.

    All count in bytes, but for the values of outliers: scales, too, so that no loader changes their precision. The
    pattern is n:m, n:m with outliers, or dense.
    """
    groups = inputs // grid.columns(inputs)
    shapes: dict[str, tuple[int, ...]] = {"scales": (outputs, groups * PRECISION_BITS[grid.scale] // 8)}
    if grid.zero_bits:
        shapes["zeros"] = (outputs, _bytes(groups * grid.zero_bits))
    if not pattern.parts():
        return shapes | {"codes": (outputs, _bytes(inputs * grid.code_bits))}
    for ending, shape in matrix.file_shapes(pattern, outputs, inputs).items():
        if (ending == "salient_values" and grid.outlier_bits is not None) or ending.endswith("index"):
            shapes[ending] = shape
        else:
            shapes[ending.replace("values", "codes")] = (outputs, _bytes(shape[1] * grid.code_bits))
    return shapes


def file_bytes(pattern: Pattern, outputs: int, inputs: int, grid: Grid) -> int:
    """The bytes of all tensors on disk."""
    total = 0
    for ending, shape in file_shapes(pattern, outputs, inputs, grid).items():
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        total += size * (2 if ending == "salient_values" else 1)
    return total


def stored_bits(pattern: Pattern, outputs: int, inputs: int, grid: Grid, kept: int | None = None) -> Counter[str]:
    """Bits of one matrix by PARTS; `kept`: its kept weights, of a pattern that has no form on disk.

    Of such a pattern the index is that in the fewest bits, and nothing is filled up.
    """
    groups = inputs // grid.columns(inputs)
    bits = Counter(dict.fromkeys(PARTS, 0))
    bits["scales"] = outputs * groups * PRECISION_BITS[grid.scale]
    bits["zero_points"] = outputs * groups * grid.zero_bits
    if pattern.parts():
        base, *outliers = pattern.parts()
        bits["values"] = outputs * base.kept_per_row(inputs) * grid.code_bits
        bits["index"] = matrix.index_bits(base, outputs, inputs)
        for part in outliers:
            each = grid.outlier_bits or grid.code_bits
            bits["outliers"] = outputs * part.kept_per_row(inputs) * each + matrix.index_bits(part, outputs, inputs)
    elif str(pattern) == "dense":
        bits["values"] = outputs * inputs * grid.code_bits
    else:
        assert kept is not None
        bits["values"], bits["index"] = kept * grid.code_bits, pattern.metadata_bits(outputs, inputs)
        return bits
    bits["padding"] = 8 * file_bytes(pattern, outputs, inputs, grid) - sum(bits.values())
    return bits


def per_weight(bits: Mapping[str, int], weights: int) -> dict[str, float]:
    """The same over so many weights."""
    return {part: bits.get(part, 0) / weights for part in PARTS}


def _bytes(bits: int) -> int:
    return -(-bits // 8)
