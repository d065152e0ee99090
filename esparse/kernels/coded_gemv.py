"""Products of quantised packed weights with 1 to 16 tokens, on a GPU.

`_coded_kernel` goes over columns: it reads a tile's codes, turns them into values in registers and multiplies these:
one token by sums in float32, more on the matrix units. The weights are read once, as codes, index and scales. Outliers
have a kernel of their own, which adds to its result.

Shapes: T tokens, O outputs, I inputs, G groups of a row that share a scale, S outliers of a row.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esparse.kernels.current import on_its_gpu
from esparse.kernels.form import Coded, Units, units
from esparse.kernels.gemv import MOST_TOKENS, kept_before, run_words, words
from esparse.kernels.registers import folded, interpreted
from esparse.kernels.tiles import Tile, fastest

WHOLE = Units(32, 32)  # the runs of a row that keeps all its weights
TILES = [Tile("coded", rows, runs, warps) for rows, runs, warps in ((16, 4, 4), (32, 4, 4), (16, 8, 8), (64, 2, 4))]


def takes(of: Coded, tokens: int, *, n: int, m: int) -> bool:
    """Whether the kernels compute this product; n = m = 1 for a matrix that keeps all weights."""
    return 1 <= tokens <= MOST_TOKENS and cut_of(of, n=n, m=m) is not None


def cut_of(of: Coded, *, n: int, m: int) -> Units | None:
    """How the kernel cuts rows into runs; None if it cannot."""
    return WHOLE if of.keep_OB is None else units(n, m)


@on_its_gpu
def product(of: Coded, x_TI: Tensor, *, n: int, m: int, tile: Tile | None = None) -> Tensor:
    """x @ W^T (T x O) in x's dtype; values are rounded to it, but for one token, and sums are float32.

    `tile`: default is the fastest, found once per shape. Raises ValueError for what `takes` does not take.
    """
    if not takes(of, len(x_TI), n=n, m=m):
        raise ValueError(f"no kernel for codes of {of.code_bits} bits at {n}:{m} and {len(x_TI)} tokens")
    x_TI = x_TI.contiguous()
    if tile is None:
        key = ("coded", x_TI.device, x_TI.dtype, of.codes_OB.shape, of.inputs, len(x_TI), n, m, of.code_bits)
        tile = fastest(key, TILES, lambda t: [partial(_launch, of, x_TI, n, m, t)])
    return _launch(of, x_TI, n, m, tile)


def _launch(of: Coded, x_TI: Tensor, n: int, m: int, tile: Tile) -> Tensor:
    cut = cut_of(of, n=n, m=m)
    assert cut is not None
    (tokens, inputs), rows = x_TI.shape, len(of.codes_OB)
    runs, splits = -(-inputs // cut.columns), tile.split
    out_STR = torch.empty(splits, tokens, rows, device=x_TI.device, dtype=x_TI.dtype if splits == 1 else torch.float32)
    bits, word = (of.codes_OB, 0) if of.keep_OB is None else words(of.keep_OB, inputs, cut)
    _coded_kernel[(triton.cdiv(rows, tile.rows), splits)](
        of.codes_OB,
        bits,
        *_scales(of),
        x_TI,
        out_STR,
        rows,
        inputs,
        of.codes_OB.stride(0),
        bits.stride(0),
        of.scale_OG.shape[1],
        inputs // of.scale_OG.shape[1],
        of.zero,
        tokens,
        triton.cdiv(runs, splits * tile.depth),
        COLUMNS=cut.columns,
        RUN_KEPT=cut.kept,
        WORD=word,
        WIDTH=triton.next_power_of_2(cut.columns),
        CODE_BITS=of.code_bits,
        WHOLE=of.keep_OB is None,
        ROWS=tile.rows,
        RUNS=tile.depth,
        TOKENS=1 if tokens == 1 else MOST_TOKENS,
        PRECISION="ieee" if x_TI.dtype == torch.float32 else None,  # no TF32
        INTERPRETED=interpreted(),
        num_warps=tile.warps,
        **_kinds(of),
    )
    y_TO = folded(out_STR, x_TI.dtype)
    return y_TO if of.outlier_places_OS is None else _with_outliers(of, x_TI, y_TO)


def _scales(of: Coded) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, zero points and levels; what is not there is another tensor, which nothing reads."""
    zeros = of.scale_OG if of.zero_OG is None else of.zero_OG
    levels = of.scale_OG if of.levels_256 is None else _on(of.levels_256, of.scale_OG.device)
    return of.scale_OG, zeros, levels


@cache
def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor that is the same for all layers, copied once: each copy would wait for the device."""
    return tensor.to(device)


def _kinds(of: Coded) -> dict[str, Any]:
    return {"ZEROS": of.zero_OG is not None, "LEVELS": of.levels_256 is not None}


def _with_outliers(of: Coded, x_TI: Tensor, y_TO: Tensor) -> Tensor:
    """The product and that of the outliers."""
    values, places = of.outlier_values_OS, of.outlier_places_OS
    assert places is not None and of.outlier_starts_S is not None
    coded = values is None
    source = of.outlier_codes_OS if values is None else values.detach()
    assert source is not None
    (rows, runs), inputs = places.shape, x_TI.shape[1]
    out_TO = torch.empty_like(y_TO)
    _outliers_kernel[(triton.cdiv(rows, 16), len(x_TI))](
        source.contiguous(),
        places.contiguous(),
        _on(of.outlier_starts_S, x_TI.device),
        *_scales(of),
        x_TI,
        y_TO,
        out_TO,
        rows,
        inputs,
        runs,
        of.scale_OG.shape[1],
        inputs // of.scale_OG.shape[1],
        of.zero,
        CODED=coded,
        ROWS=16,
        RUNS=16,
        num_warps=4,
        **_kinds(of),
    )
    return out_TO


@triton.jit
def _code_at(line, at, here, stride, CODE_BITS: tl.constexpr):
    """The codes (int32) at these places of rows' streams, the lowest bit first."""
    if CODE_BITS == 8:
        return tl.load(line + at, mask=here, other=0).to(tl.int32)
    elif CODE_BITS == 4:
        pair = tl.load(line + at // 2, mask=here, other=0).to(tl.int32)
        return (pair >> (4 * (at & 1))) & 15
    else:
        first = at * CODE_BITS
        byte = first // 8
        low = tl.load(line + byte, mask=here, other=0).to(tl.int32)
        high = tl.load(line + byte + 1, mask=here & (byte + 1 < stride), other=0).to(tl.int32)
        return ((low | (high << 8)) >> (first & 7)) & ((1 << CODE_BITS) - 1)


@triton.jit
def _value_of(code, where, here, scales, zeros, levels, zero, ZEROS: tl.constexpr, LEVELS: tl.constexpr):
    """The values (float32) of codes whose group is number `where` of all groups."""
    scale = tl.load(scales + where, mask=here, other=0.0).to(tl.float32)
    if LEVELS:
        level = tl.load(levels + code, mask=here, other=0.0)
    elif ZEROS:
        level = (code - tl.load(zeros + where, mask=here, other=0).to(tl.int32)).to(tl.float32)
    else:
        level = (code - zero).to(tl.float32)
    return tl.where(here, level * scale, 0.0)


@triton.jit(do_not_specialize=["tokens", "steps", "zero"])
def _coded_kernel(
    codes,
    bits,
    scales,
    zeros,
    levels,
    x,
    out,
    rows,
    inputs,
    code_stride,
    bit_stride,
    groups,
    group_width,
    zero,
    tokens,
    steps,
    COLUMNS: tl.constexpr,
    RUN_KEPT: tl.constexpr,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
    CODE_BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here_row = (row < rows)[:, None, None]
    line = codes + row[:, None, None].to(tl.int64) * code_stride
    place = tl.arange(0, WIDTH)[None, None, :]
    flat = tl.arange(0, RUNS * WIDTH)
    token = tl.arange(0, TOKENS)
    first_step = tl.program_id(1) * steps
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for index in range(steps):
        step = first_step + index
        run = (step * RUNS + tl.arange(0, RUNS))[None, :]
        column = run[:, :, None] * COLUMNS + place
        here = here_row & (place < COLUMNS) & (column < inputs)
        if WHOLE:
            before = place
        else:
            in_row = (row < rows)[:, None] & (run * COLUMNS < inputs)
            word = run_words(bits, row[:, None], run, in_row, bit_stride, COLUMNS, WORD)
            survives, before = kept_before(word, place, INTERPRETED)
            here = here & (survives == 1)
        code = _code_at(line, run[:, :, None] * RUN_KEPT + before, here, code_stride, CODE_BITS)
        where = row[:, None, None] * groups + column // group_width
        value = _value_of(code, where, here, scales, zeros, levels, zero, ZEROS, LEVELS)
        weight = tl.reshape(value, (ROWS, RUNS * WIDTH))
        across = (step * RUNS + flat // WIDTH) * COLUMNS + flat % WIDTH
        there = (flat % WIDTH < COLUMNS) & (across < inputs)
        if TOKENS == 1:
            x_tile = tl.load(x + across, mask=there, other=0.0).to(tl.float32)
            total += tl.sum(weight * x_tile[None, :], 1)[:, None]
        else:
            at = token[None, :] * inputs + across[:, None]
            x_tile = tl.load(x + at, mask=there[:, None] & (token[None, :] < tokens), other=0.0)
            weight = weight.to(x_tile.dtype)
            if INTERPRETED:  # the interpreter multiplies bfloat16 as if it were integers
                weight, x_tile = weight.to(tl.float32), x_tile.to(tl.float32)
            total = tl.dot(weight, x_tile, total, input_precision=PRECISION)
    goes = out + (tl.program_id(1) * tokens + token[None, :]) * rows + row[:, None]
    tl.store(goes, total.to(out.dtype.element_ty), mask=(row[:, None] < rows) & (token[None, :] < tokens))


@triton.jit(do_not_specialize=["zero"])
def _outliers_kernel(
    source,
    places,
    starts,
    scales,
    zeros,
    levels,
    x,
    y,
    out,
    rows,
    inputs,
    runs,
    groups,
    group_width,
    zero,
    CODED: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    token = tl.program_id(1)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, runs, RUNS):
        run = (first + tl.arange(0, RUNS))[None, :]
        here = (row < rows) & (run < runs)
        column = tl.load(places + row * runs + run, mask=here, other=0).to(tl.int32)
        column += tl.load(starts + run, mask=run < runs, other=0).to(tl.int32)
        found = tl.load(source + row * runs + run, mask=here, other=0)
        if CODED:
            where = row * groups + column // group_width
            value = _value_of(found.to(tl.int32), where, here, scales, zeros, levels, zero, ZEROS, LEVELS)
        else:
            value = found.to(tl.float32)
        x_here = tl.load(x + token * inputs + column, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(value * x_here, 1)
    at = token * rows + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.program_id(0) * ROWS + tl.arange(0, ROWS) < rows
    total += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
