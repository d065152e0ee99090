"""Products of a packed matrix with 1 to 16 tokens: bound by the bytes of the weights, of which 9/16 are left at 50 %.

Two kernels here take any pattern and dtype, and two in registers.py are faster and take half precision at 2:4, 4:8 and
8:16. `_gather_kernel` goes over kept weights: it reads values 16 bytes at a time, turns 16 bits into eight column
numbers by a table of all bytes, and gathers the inputs from the cache; its work grows with the tokens. `_expand_kernel`
goes over columns, expands a tile in registers and multiplies it on the matrix units: more work for one token, hardly
more for sixteen. Kernel and tile are chosen by a trial on the device, once per shape.

Shapes: T tokens, R rows, I columns, K kept weights of a row, U runs of a row (form.Units), S places of a run.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from esparse.kernels import registers
from esparse.kernels.current import on_its_gpu
from esparse.kernels.form import Units, units
from esparse.kernels.registers import interpreted
from esparse.kernels.tiles import Tile, candidates, copies, fastest, is_known

MOST_TOKENS = 16


@on_its_gpu
def matvec(
    values_RK: Tensor,
    bits_RB: Tensor,
    x_TI: Tensor,
    *,
    n: int,
    m: int,
    order_I: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """x @ W^T (T x R) for 1 to 16 tokens from W's compute form; sums are float32, the result has x's dtype.

    `order_I`: column i of W belongs to input order[i] of x. `tile`: default is the fastest, found once per shape.
    Raises ValueError if the kernels cannot cut n:m (form.units) or if shapes do not fit.
    """
    cut = units(n, m)
    tokens, inputs = x_TI.shape
    if cut is None:
        raise ValueError(f"no kernel for {n}:{m}: it takes n up to 16 and m up to 32")
    in_registers = registers.fits(values_RK, bits_RB, x_TI, n=n, m=m)
    most = registers.MOST_SPREAD if in_registers else MOST_TOKENS
    if not 1 <= tokens <= most:
        raise ValueError(f"the packed matrix-vector kernel takes 1 to {most} tokens here, got {tokens}")
    if bits_RB.shape != (len(values_RK), -(-inputs // 8)):
        raise ValueError(f"bits have the shape {tuple(bits_RB.shape)}, which does not fit {inputs} inputs")
    x_TI = x_TI.contiguous()
    if tile is None:
        key = (x_TI.device, x_TI.dtype, *values_RK.shape, inputs, tokens, n, m)
        choices = candidates(len(values_RK), inputs, tokens, n=n, m=m, in_registers=in_registers)
        pairs = copies(values_RK, bits_RB) if not is_known(key) else []
        tile = fastest(key, choices, lambda t: [partial(_launch, v, b, x_TI, order_I, n, cut, t) for v, b in pairs])
    return _launch(values_RK, bits_RB, x_TI, order_I, n, cut, tile)


def _launch(
    values_RK: Tensor, bits_RB: Tensor, x_TI: Tensor, order_I: Tensor | None, n: int, cut: Units, tile: Tile
) -> Tensor:
    tokens, inputs = x_TI.shape
    rows, kept = values_RK.shape
    runs = -(-inputs // cut.columns)
    if tile.kernel in ("select", "spread"):
        x_TI = x_TI if order_I is None else x_TI[:, order_I]
        shape = {"rows": tile.rows, "depth": tile.depth, "warps": tile.warps, "split": tile.split}
        if tile.kernel == "select":
            out = registers.select(values_RK, bits_RB, x_TI, **shape)
        else:
            out = registers.spread(values_RK, bits_RB, x_TI, n=n, **shape)
        return registers.folded(out, x_TI.dtype)
    run_bits, word = words(bits_RB, inputs, cut)
    splits = 1 if runs <= tile.depth else tile.split
    out_type = x_TI.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, tokens, rows, dtype=out_type, device=x_TI.device)
    shared = {
        "COLUMNS": cut.columns,
        "RUN_KEPT": cut.kept,
        "WORD": word,
        "ORDERED": order_I is not None,
        "ROWS": tile.rows,
        "RUNS": tile.depth,
        "num_warps": tile.warps,
    }
    # Sizes are arguments, not constants, so that a tile is compiled once for all shapes.
    sizes = (rows, inputs, kept, run_bits.stride(0), tokens, triton.cdiv(runs, splits * tile.depth))
    order = x_TI if order_I is None else order_I
    blocks = triton.cdiv(rows, tile.rows)
    at_once = min(4, triton.next_power_of_2(tokens))
    if tile.kernel == "gather":
        _gather_kernel[(blocks, splits, triton.cdiv(tokens, at_once))](
            values_RK,
            run_bits,
            x_TI,
            order,
            _columns_of_bytes(x_TI.device),
            out,
            *sizes,
            TOKENS=at_once,
            SLOTS=triton.next_power_of_2(cut.kept),
            **shared,
        )
    else:
        _expand_kernel[(blocks, splits)](
            values_RK,
            run_bits,
            x_TI,
            order,
            out,
            *sizes,
            TOKENS=16,
            WIDTH=triton.next_power_of_2(cut.columns),
            # float32 inputs are multiplied as float32 (no TF32)
            PRECISION="ieee" if x_TI.dtype == torch.float32 else None,
            INTERPRETED=interpreted(),
            **shared,
        )
    return registers.folded(out, x_TI.dtype)


def words(bits_RB: Tensor, inputs: int, cut: Units) -> tuple[Tensor, int]:
    """The bits as one integer per run if rows are whole numbers of runs; else as bytes (second value 0)."""
    if cut.columns in (16, 32) and inputs % cut.columns == 0 and bits_RB.is_contiguous():
        return bits_RB.view(torch.int16 if cut.columns == 16 else torch.int32), cut.columns
    return bits_RB.contiguous(), 0


@cache
def _columns_of_bytes(device: torch.device) -> Tensor:
    """For each byte the indices of its set bits, four bits each, and from bit 32 on four times their number.

    256 entries for the lower byte of 16 bits come first, then 256 for the upper one.
    """
    entries = []
    for first in (0, 8):
        for byte in range(256):
            columns = [first + bit for bit in range(8) if byte >> bit & 1]
            entries.append(sum(column << 4 * k for k, column in enumerate(columns)) | 4 * len(columns) << 32)
    return torch.tensor(entries, dtype=torch.int64, device=device)


@triton.jit
def run_words(bits, row, run, inside, stride, COLUMNS: tl.constexpr, WORD: tl.constexpr):
    """The bits of runs of rows (int64, bit j = column j of the run); `inside` masks runs that exist."""
    if WORD > 0:
        words = tl.load(bits + row * stride + run, mask=inside, other=0).to(tl.int64)
        return words & ((1 << WORD) - 1)
    else:
        first = run * COLUMNS
        words = tl.zeros_like(row + run).to(tl.int64)
        for byte in tl.static_range((COLUMNS + 14) // 8):  # a run may begin at the last bit of a byte
            at = first // 8 + byte
            one = tl.load(bits + row * stride + at, mask=inside & (at < stride), other=0)
            words |= one.to(tl.int64) << (8 * byte)
        return (words >> (first % 8).to(tl.int64)) & ((1 << COLUMNS) - 1)


@triton.jit
def _listed(table, half):
    """The columns of up to 16 set bits, four bits each, and four times their number."""
    low = tl.load(table + (half & 255))
    high = tl.load(table + 256 + (half >> 8))
    columns = (low & 0xFFFFFFFF) | ((high & 0xFFFFFFFF) << (low >> 32))
    return columns, (low >> 32) + (high >> 32)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _gather_kernel(
    values,
    bits,
    x,
    order,
    table,
    out,
    rows,
    inputs,
    kept,
    bit_stride,
    tokens,
    steps,
    COLUMNS: tl.constexpr,
    RUN_KEPT: tl.constexpr,
    WORD: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    # Values are loaded as one long row, so that the threads of a warp read neighbours; each thread holds whole runs.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, RUNS * SLOTS)[None, :]
    number = tl.arange(0, RUNS)[None, :]
    slot = tl.arange(0, SLOTS)[None, None, :]
    token = tl.program_id(2) * TOKENS
    step = tl.program_id(1) * steps * RUNS  # the first run of a step
    kept_end = tl.minimum(kept, (step + steps * RUNS) * RUN_KEPT)
    inputs_end = tl.minimum(inputs, (step + steps * RUNS) * COLUMNS)
    row_here = (row < rows)[:, None]
    sum0 = tl.zeros((ROWS, RUNS, SLOTS), tl.float32)
    sum1 = tl.zeros((ROWS, RUNS, SLOTS), tl.float32)
    sum2 = tl.zeros((ROWS, RUNS, SLOTS), tl.float32)
    sum3 = tl.zeros((ROWS, RUNS, SLOTS), tl.float32)
    own = values + row[:, None].to(tl.int64) * kept
    # With as many places as kept weights, the places are contiguous.
    at = place if SLOTS == RUN_KEPT else place // SLOTS * RUN_KEPT + place % SLOTS
    is_slot = (place % SLOTS < RUN_KEPT) & row_here
    here = is_slot & (step * RUN_KEPT + at < kept_end)
    loaded = tl.load(own + step * RUN_KEPT + at, mask=here, other=0.0)
    run = step + number
    word = run_words(bits, row[:, None], run, row_here & (run * COLUMNS < inputs), bit_stride, COLUMNS, WORD)
    for _ in range(steps):
        # The next weights are loaded while these are multiplied.
        step += RUNS
        next_here = is_slot & (step * RUN_KEPT + at < kept_end)
        next_loaded = tl.load(own + step * RUN_KEPT + at, mask=next_here, other=0.0)
        after = step + number
        there = row_here & (after * COLUMNS < inputs_end)
        next_word = run_words(bits, row[:, None], after, there, bit_stride, COLUMNS, WORD)
        value = tl.reshape(loaded, (ROWS, RUNS, SLOTS)).to(tl.float32)
        columns, count4 = _listed(table, word[:, :, None] & 65535)
        if COLUMNS > 16:
            upper, _ = _listed(table, (word[:, :, None] >> 16) & 65535)
            # If all 16 columns are in the lower byte's list, the upper list is empty and any shift is right.
            columns |= upper << tl.minimum(count4, 60)
        if SLOTS <= 8:
            column = ((columns.to(tl.int32) >> (4 * slot)) & 15).to(tl.int32)
        else:
            column = ((columns >> (4 * slot).to(tl.int64)) & 15).to(tl.int32)
        if COLUMNS > 16:
            column += tl.where(4 * slot >= count4.to(tl.int32), 16, 0)
        column += run[:, :, None] * COLUMNS
        is_here = tl.reshape(here, (ROWS, RUNS, SLOTS))
        if ORDERED:
            column = tl.load(order + column, mask=is_here, other=0).to(tl.int32)
        # Beyond the last token the last one is computed again and not stored.
        sum0 += value * tl.load(x + token * inputs + column, mask=is_here, other=0.0).to(tl.float32)
        if TOKENS > 1:
            row1 = x + tl.minimum(token + 1, tokens - 1) * inputs
            sum1 += value * tl.load(row1 + column, mask=is_here, other=0.0).to(tl.float32)
        if TOKENS > 2:
            row2 = x + tl.minimum(token + 2, tokens - 1) * inputs
            row3 = x + tl.minimum(token + 3, tokens - 1) * inputs
            sum2 += value * tl.load(row2 + column, mask=is_here, other=0.0).to(tl.float32)
            sum3 += value * tl.load(row3 + column, mask=is_here, other=0.0).to(tl.float32)
        run, here, loaded, word = after, next_here, next_loaded, next_word
    place_out = out + (tl.program_id(1) * tokens + token) * rows + row
    kind = out.dtype.element_ty
    tl.store(place_out, tl.sum(tl.sum(sum0, 2), 1).to(kind), mask=row < rows)
    if TOKENS > 1:
        fits = row < tl.where(token + 1 < tokens, rows, 0)
        tl.store(place_out + rows, tl.sum(tl.sum(sum1, 2), 1).to(kind), mask=fits)
    if TOKENS > 2:
        fits = row < tl.where(token + 2 < tokens, rows, 0)
        tl.store(place_out + 2 * rows, tl.sum(tl.sum(sum2, 2), 1).to(kind), mask=fits)
        fits = row < tl.where(token + 3 < tokens, rows, 0)
        tl.store(place_out + 3 * rows, tl.sum(tl.sum(sum3, 2), 1).to(kind), mask=fits)


@triton.jit
def kept_before(word, place, INTERPRETED: tl.constexpr):
    """Of each place of runs whether it is kept (0 or 1), and how many places before it are."""
    word = word.to(tl.uint32)[:, :, None]
    survives = ((word >> place.to(tl.uint32)) & 1).to(tl.int32)
    if INTERPRETED:  # the interpreter has no population count
        before = tl.cumsum(survives, 2) - survives
    else:
        lower = word & ((1 << place.to(tl.uint32)) - 1)
        before = libdevice.popc(lower.to(tl.int32, bitcast=True))
    return survives, before


@triton.jit
def expanded(
    values,
    bits,
    row,
    run,
    rows,
    inputs,
    kept,
    bit_stride,
    COLUMNS: tl.constexpr,
    RUN_KEPT: tl.constexpr,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The dense values (ROWS, RUNS, WIDTH) of runs of rows, with zeros for pruned weights."""
    place = tl.arange(0, WIDTH)[None, None, :]
    word = run_words(bits, row, run, (row < rows) & (run * COLUMNS < inputs), bit_stride, COLUMNS, WORD)
    survives, before = kept_before(word, place, INTERPRETED)
    at = run[:, :, None] * RUN_KEPT + before
    return tl.load(values + row[:, :, None].to(tl.int64) * kept + at, mask=survives == 1, other=0.0)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _expand_kernel(
    values,
    bits,
    x,
    order,
    out,
    rows,
    inputs,
    kept,
    bit_stride,
    tokens,
    steps,
    COLUMNS: tl.constexpr,
    RUN_KEPT: tl.constexpr,
    WORD: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    place = tl.arange(0, RUNS * WIDTH)
    first_step = tl.program_id(1) * steps
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for index in range(steps):
        step = first_step + index
        run = (step * RUNS + tl.arange(0, RUNS))[None, :]
        weight = expanded(
            values,
            bits,
            row[:, None],
            run,
            rows,
            inputs,
            kept,
            bit_stride,
            COLUMNS,
            RUN_KEPT,
            WORD,
            WIDTH,
            INTERPRETED,
        )
        column = (step * RUNS + place // WIDTH) * COLUMNS + place % WIDTH
        here = (place % WIDTH < COLUMNS) & (column < inputs)
        if ORDERED:
            column = tl.load(order + column, mask=here, other=0).to(tl.int32)
        x_here = here[:, None] & (token[None, :] < tokens)
        x_tile = tl.load(x + token[None, :] * inputs + column[:, None], mask=x_here, other=0.0)
        if INTERPRETED:  # the interpreter multiplies bfloat16 as if it were integers
            weight, x_tile = weight.to(tl.float32), x_tile.to(tl.float32)
        total = tl.dot(tl.reshape(weight, (ROWS, RUNS * WIDTH)), x_tile, total, input_precision=PRECISION)
    at = out + (tl.program_id(1) * tokens + token[None, :]) * rows + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row[:, None] < rows) & (token[None, :] < tokens))
