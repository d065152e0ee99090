"""Products of quantised packed weights on a CPU, compiled by numba (extra `cpu`).

The codes of a row become bytes, are spread over a piece of its columns, and turned into values in a core's cache, where
they are multiplied; no more than a piece of a row is ever there as numbers. For one token and integers without zero
points, the values do not leave the registers: a group's sum of levels times inputs is multiplied by its scale.

Shapes: T tokens, O outputs, I inputs, K kept weights of a row, S outliers, G groups of a row, B bytes of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from esparse.kernels.byte_lanes import accumulate_levels, eight_bytes, spread_codes, unpack_halves
from esparse.kernels.compiled import (
    COLUMNS,
    LANES,
    STORED,
    _count,
    _on_each_core,
    _put,
    _whole_word,
    _wide,
    _word,
    features,
    takes,
)
from esparse.kernels.form import Coded


def product(of: Coded, x_TI: Tensor) -> Tensor:
    """x @ W^T (T x O) in float32, for a few tokens; reads the codes once."""
    x = x_TI.float().contiguous().view(-1).numpy()
    y_OT = np.empty((len(of.codes_OB), len(x_TI)), np.float32)
    matrix, outliers, vectors = _matrix(of), _outliers(of), spreads()
    columns = of.inputs // of.scale_OG.shape[1]
    fused = len(x_TI) == 1 and of.levels_256 is None and of.outlier_places_OS is None and columns % LANES == 0
    fused &= vectors or of.keep_OB is None

    def rows(first: int, end: int) -> None:
        if fused:
            _product_of_one(*matrix, x, y_OT, first, end)
        else:
            _product(*matrix, *outliers, x, y_OT, first, end, vectors)

    _on_each_core(rows, len(y_OT), of.inputs)
    return torch.from_numpy(y_OT).T


def dense(of: Coded, rows: slice) -> Tensor:
    """Some rows, dense (float32)."""
    weight_OI = torch.empty(rows.stop - rows.start, of.inputs)
    out, matrix, outliers, vectors = weight_OI.view(-1).numpy(), _matrix(of), _outliers(of), spreads()

    def some(start: int, stop: int) -> None:
        _expand(*matrix, *outliers, out, rows.start + start, rows.start + stop, rows.start, vectors)

    _on_each_core(some, len(weight_OI), of.inputs)
    return weight_OI


def spreads() -> bool:
    """Whether this CPU spreads 32 bytes with one instruction."""
    return "avx512vbmi2" in features()


NOTHING, NO_STARTS, NO_LEVELS = np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.float32)


def _matrix(of: Coded) -> tuple[Any, ...]:
    """The loops' arguments that say what the codes stand for; what is not there is empty."""
    scale_OG = of.scale_OG if takes(of.scale_OG.dtype) else of.scale_OG.float()
    keep_bytes = 0 if of.keep_OB is None else of.keep_OB.shape[1]
    sizes = (of.inputs, of.kept, of.code_bits, of.codes_OB.shape[1], keep_bytes, scale_OG.shape[1], of.zero)
    return (
        np.array(sizes, np.int64),
        _flat(of.codes_OB),
        _flat(of.keep_OB),
        _flat(scale_OG.view(STORED[scale_OG.dtype])),
        _flat(of.zero_OG),
        NO_LEVELS if of.levels_256 is None else of.levels_256.numpy(),
    )


def _outliers(of: Coded) -> tuple[Any, ...]:
    values = torch.empty(0) if of.outlier_values_OS is None else of.outlier_values_OS.detach()
    values = values if takes(values.dtype) else values.float()
    starts = NO_STARTS if of.outlier_starts_S is None else of.outlier_starts_S.numpy()
    return _flat(values.view(STORED[values.dtype])), _flat(of.outlier_codes_OS), _flat(of.outlier_places_OS), starts


def _flat(x: Tensor | None) -> Any:
    return NOTHING if x is None else x.contiguous().view(-1).numpy()


@njit(nogil=True, cache=True)
def _unpack(codes: Any, byte: int, bits: int, count: int, out: Any) -> None:
    """Writes the `count` codes of the stream that begins at a byte, and up to seven more."""
    here = np.uint64(byte)  # numba would check signed indices for being negative
    if bits == 8:
        for k in range(count):
            out[np.uint64(k)] = codes[here + np.uint64(k)]
        return
    if bits == 4:
        whole = count // LANES
        unpack_halves(codes, byte, whole, out)
        for k in range(whole * LANES // 2, (count + 1) // 2):
            pair = codes[here + np.uint64(k)]
            out[np.uint64(2 * k)], out[np.uint64(2 * k + 1)] = pair & np.uint8(15), pair >> np.uint8(4)
        return
    ones, eights = np.uint64((1 << bits) - 1), out[: out.size // 8 * 8].view(np.uint64)
    four, two, one = np.uint64(4 * bits), np.uint64(16 - 2 * bits), np.uint64(8 - bits)
    low4 = (np.uint64(1) << four) - np.uint64(1)
    low2 = ((np.uint64(1) << np.uint64(2 * bits)) - np.uint64(1)) * np.uint64(0x1_0000_0001)
    low1 = ones * np.uint64(0x1_0001_0001_0001)
    left = (count * bits + 7) // 8
    for eight in range((count + 7) // 8):  # eight codes take `bits` bytes; they move apart by halves
        if left >= 8:
            word = eight_bytes(codes, here)
        else:
            word = np.uint64(0)
            for k in range(left):
                word |= np.uint64(codes[here + np.uint64(k)]) << np.uint64(8 * k)
        here += np.uint64(bits)
        left -= bits
        word = (word & low4) | ((word >> four) & low4) << np.uint64(32)
        word = (word & low2) | (word << two) & (low2 << np.uint64(16))
        eights[eight] = (word & low1) | (word << one) & (low1 << np.uint64(8))


@njit(nogil=True, cache=True)
def _spread_row(
    codes: Any, first: int, keep: Any, byte: int, end: int, inputs: int, zero: int, out: Any, kept: Any, vectors: bool
) -> None:
    """Writes a row's codes to their columns, `zero` to pruned ones; unless empty, `kept` says which those are not."""
    at: Any = first
    for column in range(0, inputs, LANES):
        word = _whole_word(keep, byte) if byte + 4 <= end else _word(keep, byte, end)
        byte += 4
        if vectors:
            spread_codes(codes, at, word, zero, out, column)
            at += np.int64(_count(word))
        else:
            out[column : column + LANES] = zero
            at = _put(codes, at, word, out, column)
        if len(kept):
            for bit in range(LANES):
                kept[np.uint64(column + bit)] = np.uint8(word >> np.uint64(bit)) & np.uint8(1)


@njit(nogil=True, cache=True)
def _values(
    codes: Any, kept: Any, first: int, columns: int, inputs: int, groups: int, group: int, scales: Any, zeros: Any,
    zero: int, levels: Any, out: Any, place: int,
) -> None:  # fmt: skip
    """Writes the values of some columns of a row, whose codes stand at their columns; `group`: its first group."""
    width, column = inputs // groups, first
    while column < first + columns:
        own = column // width
        end = min(first + columns, (own + 1) * width)
        scale = _wide(scales[group + own])
        # Slices, because checks for negative indices would prevent vector instructions.
        part, marks, target = codes[column:end], kept[column:end], out[place + column - first : place + end - first]
        if len(levels):
            for c in range(end - column):
                target[c] = levels[np.uint64(part[c])] * scale
        elif len(zeros):
            of_group = np.int32(zeros[group + own])
            for c in range(end - column):
                target[c] = np.float32(np.int32(part[c]) - of_group * np.int32(marks[c])) * scale
        else:
            for c in range(end - column):
                target[c] = np.float32(np.int32(part[c]) - np.int32(zero)) * scale
        column = end


@njit(nogil=True, cache=True)
def _outlier(values: Any, codes: Any, at: Any, group: int, scales: Any, zeros: Any, zero: int, levels: Any) -> Any:
    if len(codes) == 0:
        return _wide(values[at])
    code = codes[at]
    if len(levels):
        return levels[code] * _wide(scales[group])
    of_group = np.int32(zeros[group]) if len(zeros) else np.int32(zero)
    return np.float32(np.int32(code) - of_group) * _wide(scales[group])


@njit(nogil=True, cache=True)
def _row_of_codes(
    sizes: Any, codes: Any, keep: Any, row: int, with_kept: bool, stream: Any, spread: Any, kept: Any, vectors: bool
) -> None:
    """Writes a row's codes to their columns."""
    inputs, count, bits, row_bytes, keep_bytes, _, zero = sizes
    if keep_bytes == 0:
        _unpack(codes, row * row_bytes, bits, count, spread)
        return
    byte, end = row * keep_bytes, (row + 1) * keep_bytes
    marks = kept if with_kept else kept[:0]
    background = 0 if with_kept else zero
    if bits == 8:
        _spread_row(codes, row * row_bytes, keep, byte, end, inputs, background, spread, marks, vectors)
    else:
        _unpack(codes, row * row_bytes, bits, count, stream)
        _spread_row(stream, 0, keep, byte, end, inputs, background, spread, marks, vectors)


@njit(nogil=True, fastmath=True, cache=True)
def _dot(piece: Any, x: Any, first: int, columns: int) -> Any:
    part, total = x[first : first + columns], np.float32(0.0)
    for column in range(columns):
        total += piece[column] * part[column]
    return total


@njit(nogil=True, cache=True)
def _product(
    sizes: Any, codes: Any, keep: Any, scales: Any, zeros: Any, levels: Any,
    outlier_values: Any, outlier_codes: Any, places: Any, starts: Any,
    x: Any, y_OT: Any, first: int, end: int, vectors: bool,
) -> None:  # fmt: skip
    inputs, _, _, _, _, groups, zero = sizes
    piece = np.empty(COLUMNS, np.float32)
    stream, spread = np.empty(inputs + LANES, np.uint8), np.empty(inputs + LANES, np.uint8)
    kept = np.ones(inputs + LANES, np.uint8)
    tokens, runs, width = y_OT.shape[1], len(starts), inputs // groups
    for row in range(first, end):
        _row_of_codes(sizes, codes, keep, row, len(zeros) > 0, stream, spread, kept, vectors)
        y_OT[row] = 0
        number, group = 0, row * groups
        for start in range(0, inputs, COLUMNS):
            columns = min(COLUMNS, inputs - start)
            _values(spread, kept, start, columns, inputs, groups, group, scales, zeros, zero, levels, piece, 0)
            while number < runs:
                at = np.uint64(row * runs + number)
                there = np.int64(starts[number]) + np.int64(places[at])
                if there >= start + columns:
                    break
                own = group + there // width
                piece[there - start] += _outlier(outlier_values, outlier_codes, at, own, scales, zeros, zero, levels)
                number += 1
            for token in range(tokens):
                y_OT[row, token] += _dot(piece, x, token * inputs + start, columns)


@njit(nogil=True, fastmath=True, cache=True)
def _product_of_one(
    sizes: Any, codes: Any, keep: Any, scales: Any, zeros: Any, levels: Any, x: Any, y_OT: Any, first: int, end: int
) -> None:
    """The product with one token, of integers whose groups are whole words: values never leave the registers."""
    inputs, count, bits, row_bytes, keep_bytes, groups, zero = sizes
    stream, sums, width = np.empty(inputs + LANES, np.uint8), np.empty(LANES, np.float32), inputs // groups
    at: Any
    for row in range(first, end):
        sums[:] = 0
        source, at = (codes, row * row_bytes) if bits == 8 else (stream, 0)
        if bits != 8:
            _unpack(codes, row * row_bytes, bits, count, stream)
        for group in range(groups):
            scale = _wide(scales[row * groups + group])
            of_group = np.int64(zeros[row * groups + group]) if len(zeros) else zero
            start = group * width
            if keep_bytes:
                byte = row * keep_bytes + start // 8
                at = accumulate_levels(source, at, keep, byte, width // LANES, of_group, scale, x, start, sums)
            else:
                total, part, x_part = np.float32(0), source[at : at + width], x[start : start + width]
                for k in range(width):
                    total += np.float32(np.int32(part[k]) - np.int32(of_group)) * x_part[k]
                sums[0] += scale * total
                at += width
        y_OT[row, 0] = sums.sum()


@njit(nogil=True, cache=True)
def _expand(
    sizes: Any, codes: Any, keep: Any, scales: Any, zeros: Any, levels: Any,
    outlier_values: Any, outlier_codes: Any, places: Any, starts: Any,
    out: Any, first: int, end: int, offset: int, vectors: bool,
) -> None:  # fmt: skip
    inputs, _, _, _, _, groups, zero = sizes
    stream, spread = np.empty(inputs + LANES, np.uint8), np.empty(inputs + LANES, np.uint8)
    kept = np.ones(inputs + LANES, np.uint8)
    runs, width = len(starts), inputs // groups
    for row in range(first, end):
        _row_of_codes(sizes, codes, keep, row, len(zeros) > 0, stream, spread, kept, vectors)
        begin, group = (row - offset) * inputs, row * groups
        _values(spread, kept, 0, inputs, inputs, groups, group, scales, zeros, zero, levels, out, begin)
        for number in range(runs):
            at = np.uint64(row * runs + number)
            there = np.int64(starts[number]) + np.int64(places[at])
            own = group + there // width
            out[begin + there] += _outlier(outlier_values, outlier_codes, at, own, scales, zeros, zero, levels)
