"""Products of packed matrices by permuting bytes in registers, without index look-ups in memory.

They take half precision, runs of 16 columns with 8 kept weights (2:4, 4:8, 8:16), and rows of whole runs. A byte
permute (PTX `prmt`) picks four of the eight bytes of two registers. `_select_kernel` (2:4 only) uses it to pick, in
each group, the two inputs that belong to the two values. `_spread_kernel`, for more tokens, uses it to put the values
among zeros and multiplies the dense tile on the matrix units.

Shapes: T tokens, R rows, I columns, K kept weights of a row, U runs of a row; 4 quads of a run, 2 values of a quad.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esparse.kernels.byte_permute import (
    COLUMN0_HIGH,
    COLUMN0_LOW,
    COLUMN1_HIGH,
    COLUMN1_LOW,
    COLUMN2_HIGH,
    COLUMN2_LOW,
    COLUMN3_HIGH,
    COLUMN3_LOW,
    EVEN,
    FIRST_HIGH,
    FIRST_LOW,
    ODD,
    SECOND_HIGH,
    SECOND_LOW,
    USED,
    looked_up,
    permuted,
    shifted,
    wide,
)
from esparse.kernels.form import in_place, in_registers

MOST_SELECTED = 8  # most tokens of `_select_kernel`
MOST_SPREAD = 64  # most tokens of `_spread_kernel`


def fits(values_RK: Tensor, bits_RB: Tensor, x_TI: Tensor, *, n: int, m: int) -> bool:
    """Whether these kernels can compute this product."""
    return (
        values_RK.dtype == x_TI.dtype and in_registers(x_TI.dtype, x_TI.shape[1], n, m) and in_place(values_RK, bits_RB)
    )


def select(
    values_RK: Tensor, bits_RB: Tensor, x_TI: Tensor, *, rows: int, depth: int, warps: int, split: int
) -> Tensor:
    """x @ W^T in float32, one sum for each of `split` parts of the inputs (split x T x R); 2:4 only."""
    tokens, inputs = x_TI.shape
    outputs, runs = len(values_RK), inputs // 16
    out = _out(values_RK, x_TI, split)
    at_once = min(MOST_SELECTED, triton.next_power_of_2(tokens))
    _select_kernel[(triton.cdiv(outputs, rows), split, triton.cdiv(tokens, at_once))](
        values_RK.view(torch.int32),
        bits_RB.view(torch.int16),
        _aligned(x_TI).view(torch.int64),
        out,
        outputs,
        runs,
        tokens,
        triton.cdiv(runs, split * depth),
        ROWS=rows,
        RUNS=depth,
        TOKENS=at_once,
        BFLOAT=x_TI.dtype == torch.bfloat16,
        INTERPRETED=interpreted(),
        num_warps=warps,
    )
    return out


def spread(
    values_RK: Tensor, bits_RB: Tensor, x_TI: Tensor, *, n: int, rows: int, depth: int, warps: int, split: int
) -> Tensor:
    """The same for 2:4, 4:8 and 8:16 on matrix units, for 1 to 64 tokens."""
    tokens, inputs = x_TI.shape
    outputs, runs = len(values_RK), inputs // 16
    out = _out(values_RK, x_TI, split)
    _spread_kernel[(triton.cdiv(outputs, rows), split)](
        values_RK.view(torch.int32),
        bits_RB.view(torch.int16),
        x_TI,
        out,
        outputs,
        runs,
        tokens,
        triton.cdiv(runs, split * depth),
        ROWS=rows,
        RUNS=depth,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        PAIRS=n == 2,
        INTERPRETED=interpreted(),
        num_warps=warps,
    )
    return out


def folded(parts_STR: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the parts (T x R)."""
    if len(parts_STR) == 1:
        return parts_STR[0]
    out_TR = torch.empty(parts_STR.shape[1:], dtype=dtype, device=parts_STR.device)
    _fold_kernel[(triton.cdiv(out_TR.numel(), 256),)](
        parts_STR, out_TR, out_TR.numel(), PARTS=len(parts_STR), BLOCK=256, num_warps=2
    )
    return out_TR


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    return not isinstance(_select_kernel, triton.runtime.JITFunction)


def _out(values_RK: Tensor, x_TI: Tensor, split: int) -> Tensor:
    kind = x_TI.dtype if split == 1 else torch.float32
    return torch.empty(split, len(x_TI), len(values_RK), dtype=kind, device=x_TI.device)


def _aligned(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.data_ptr() % 16 == 0 else x_TI.clone()


@triton.jit
def _met(x, at, inside, selector, value0, value1, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """The products of each quad's values with their inputs, for one token."""
    four = tl.reshape(tl.load(x + at, mask=inside, other=0), selector.shape)
    pair = permuted(four.to(tl.int32), (four >> 32).to(tl.int32), selector, INTERPRETED)
    x0, x1 = wide(pair, BFLOAT)
    return value0 * x0 + value1 * x1


@triton.jit
def _stored(out, total, token, tokens, rows, row):
    """Stores a token's sums (ROWS, RUNS, 4) if the token exists."""
    fits = row < tl.where(token < tokens, rows, 0)
    total = tl.sum(tl.sum(total, 2), 1)
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _select_kernel(
    values,
    bits,
    x,
    out,
    rows,
    runs,
    tokens,
    steps,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BFLOAT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Quads are loaded as one long row, so that the threads of a warp read neighbours; each thread holds whole runs.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    quad = tl.arange(0, RUNS * 4)[None, :]
    number = tl.arange(0, 4)[None, None, :]
    token = tl.program_id(2) * TOKENS
    first = tl.program_id(1) * steps * RUNS
    end = tl.minimum(runs, first + steps * RUNS)
    sum0 = tl.zeros((ROWS, RUNS, 4), tl.float32)
    sum1 = tl.zeros((ROWS, RUNS, 4), tl.float32)
    sum2 = tl.zeros((ROWS, RUNS, 4), tl.float32)
    sum3 = tl.zeros((ROWS, RUNS, 4), tl.float32)
    sum4 = tl.zeros((ROWS, RUNS, 4), tl.float32)
    sum5 = tl.zeros((ROWS, RUNS, 4), tl.float32)
    sum6 = tl.zeros((ROWS, RUNS, 4), tl.float32)
    sum7 = tl.zeros((ROWS, RUNS, 4), tl.float32)
    stride, last = runs * 4, tokens - 1  # beyond the last token the last one is computed again and not stored
    row_here = (row < rows)[:, None]
    own_values = values + row[:, None].to(tl.int64) * stride + quad
    own_bits = bits + row[:, None].to(tl.int64) * runs + tl.arange(0, RUNS)[None, :]
    value = tl.load(own_values + first * 4, mask=row_here & (first * 4 + quad < end * 4), other=0)
    word = tl.load(own_bits + first, mask=row_here & (first + tl.arange(0, RUNS)[None, :] < end), other=0)
    for index in range(steps):
        run = first + index * RUNS
        # The next weights are loaded while these are multiplied.
        after = run + RUNS
        next_value = tl.load(own_values + after * 4, mask=row_here & (after * 4 + quad < end * 4), other=0)
        next_word = tl.load(own_bits + after, mask=row_here & (after + tl.arange(0, RUNS)[None, :] < end), other=0)
        three = word[:, :, None].to(tl.int32) & 0x7777
        first_four = looked_up(FIRST_LOW, FIRST_HIGH, three, INTERPRETED)
        second_four = looked_up(SECOND_LOW, SECOND_HIGH, three, INTERPRETED)
        selector = permuted(first_four, second_four, 0x40 + 0x11 * number, INTERPRETED)
        value0, value1 = wide(tl.reshape(value, (ROWS, RUNS, 4)), BFLOAT)
        at = run * 4 + quad
        inside = row_here & (at < stride)
        sum0 += _met(x + token * stride, at, inside, selector, value0, value1, BFLOAT, INTERPRETED)
        if TOKENS > 1:
            t1 = tl.minimum(token + 1, last) * stride
            sum1 += _met(x + t1, at, inside, selector, value0, value1, BFLOAT, INTERPRETED)
        if TOKENS > 2:
            t2, t3 = tl.minimum(token + 2, last) * stride, tl.minimum(token + 3, last) * stride
            sum2 += _met(x + t2, at, inside, selector, value0, value1, BFLOAT, INTERPRETED)
            sum3 += _met(x + t3, at, inside, selector, value0, value1, BFLOAT, INTERPRETED)
        if TOKENS > 4:
            t4, t5 = tl.minimum(token + 4, last) * stride, tl.minimum(token + 5, last) * stride
            t6, t7 = tl.minimum(token + 6, last) * stride, tl.minimum(token + 7, last) * stride
            sum4 += _met(x + t4, at, inside, selector, value0, value1, BFLOAT, INTERPRETED)
            sum5 += _met(x + t5, at, inside, selector, value0, value1, BFLOAT, INTERPRETED)
            sum6 += _met(x + t6, at, inside, selector, value0, value1, BFLOAT, INTERPRETED)
            sum7 += _met(x + t7, at, inside, selector, value0, value1, BFLOAT, INTERPRETED)
        value, word = next_value, next_word
    part = out + tl.program_id(1) * tokens * rows
    _stored(part, sum0, token, tokens, rows, row)
    if TOKENS > 1:
        _stored(part, sum1, token + 1, tokens, rows, row)
    if TOKENS > 2:
        _stored(part, sum2, token + 2, tokens, rows, row)
        _stored(part, sum3, token + 3, tokens, rows, row)
    if TOKENS > 4:
        _stored(part, sum4, token + 4, tokens, rows, row)
        _stored(part, sum5, token + 5, tokens, rows, row)
        _stored(part, sum6, token + 6, tokens, rows, row)
        _stored(part, sum7, token + 7, tokens, rows, row)


@triton.jit
def _fold_kernel(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _quads(value, word, number, INTERPRETED: tl.constexpr):
    """Columns 0, 1 and 2, 3 of each quad at 2:4, as registers (ROWS, RUNS, 4)."""
    three = word & 0x7777
    c0 = looked_up(COLUMN0_LOW, COLUMN0_HIGH, three, INTERPRETED)
    c1 = looked_up(COLUMN1_LOW, COLUMN1_HIGH, three, INTERPRETED)
    c2 = looked_up(COLUMN2_LOW, COLUMN2_HIGH, three, INTERPRETED)
    c3 = looked_up(COLUMN3_LOW, COLUMN3_HIGH, three, INTERPRETED)
    pick = 0x40 + 0x11 * number
    low, high = permuted(c0, c1, pick, INTERPRETED), permuted(c2, c3, pick, INTERPRETED)
    zero = value ^ value
    return permuted(value, zero, low, INTERPRETED), permuted(value, zero, high, INTERPRETED)


@triton.jit
def _two_columns(v0, selectors_even, selectors_odd, WHICH: tl.constexpr, INTERPRETED: tl.constexpr):
    """Two columns of a run as one register, filled from the next two values."""
    selector = permuted(selectors_even, selectors_odd, (v0 ^ v0) + (0x40 + 0x11 * WHICH), INTERPRETED)
    return permuted(v0, v0 ^ v0, selector, INTERPRETED)


@triton.jit
def _used_up(v0, v1, v2, v3, used, WHICH: tl.constexpr, INTERPRETED: tl.constexpr):
    """The remaining values after two columns took theirs."""
    count = (used >> (8 * WHICH)) & 255
    zero = v3 ^ v3
    v0 = shifted(v0, v1, count, INTERPRETED)
    v1 = shifted(v1, v2, count, INTERPRETED)
    v2 = shifted(v2, v3, count, INTERPRETED)
    v3 = shifted(v3, zero, count, INTERPRETED)
    return v0, v1, v2, v3


@triton.jit
def _streamed(v0, v1, v2, v3, word, INTERPRETED: tl.constexpr):
    """The 16 columns of each run, with 8 kept weights in any places, as eight registers of two columns."""
    # Two bits of every four: columns 0 1, 4 5, 8 9, 12 13; then the other columns.
    here, between = word & 0x3333, (word >> 2) & 0x3333
    even_a, odd_a = looked_up(EVEN, EVEN, here, INTERPRETED), looked_up(ODD, ODD, here, INTERPRETED)
    even_b, odd_b = looked_up(EVEN, EVEN, between, INTERPRETED), looked_up(ODD, ODD, between, INTERPRETED)
    used_a, used_b = looked_up(USED, USED, here, INTERPRETED), looked_up(USED, USED, between, INTERPRETED)
    c0 = _two_columns(v0, even_a, odd_a, 0, INTERPRETED)
    v0, v1, v2, v3 = _used_up(v0, v1, v2, v3, used_a, 0, INTERPRETED)
    c1 = _two_columns(v0, even_b, odd_b, 0, INTERPRETED)
    v0, v1, v2, v3 = _used_up(v0, v1, v2, v3, used_b, 0, INTERPRETED)
    c2 = _two_columns(v0, even_a, odd_a, 1, INTERPRETED)
    v0, v1, v2, v3 = _used_up(v0, v1, v2, v3, used_a, 1, INTERPRETED)
    c3 = _two_columns(v0, even_b, odd_b, 1, INTERPRETED)
    v0, v1, v2, v3 = _used_up(v0, v1, v2, v3, used_b, 1, INTERPRETED)
    c4 = _two_columns(v0, even_a, odd_a, 2, INTERPRETED)
    v0, v1, v2, v3 = _used_up(v0, v1, v2, v3, used_a, 2, INTERPRETED)
    c5 = _two_columns(v0, even_b, odd_b, 2, INTERPRETED)
    v0, v1, v2, v3 = _used_up(v0, v1, v2, v3, used_b, 2, INTERPRETED)
    c6 = _two_columns(v0, even_a, odd_a, 3, INTERPRETED)
    v0, v1, v2, v3 = _used_up(v0, v1, v2, v3, used_a, 3, INTERPRETED)
    c7 = _two_columns(v0, even_b, odd_b, 3, INTERPRETED)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _halves(pair, kind: tl.constexpr):
    return pair.to(tl.int16).to(kind, bitcast=True), (pair >> 16).to(tl.int16).to(kind, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _spread_kernel(
    values,
    bits,
    x,
    out,
    rows,
    runs,
    tokens,
    steps,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    kind: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    number = tl.arange(0, 4)[None, None, :]
    quad = tl.arange(0, RUNS * 4)[None, :]
    column = tl.arange(0, RUNS * 16)
    first = tl.program_id(1) * steps * RUNS
    own_values = values + row[:, None].to(tl.int64) * runs * 4 + quad
    own_bits = bits + row[:, None].to(tl.int64) * runs + tl.arange(0, RUNS)[None, :]
    row_here = (row < rows)[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for index in range(steps):
        run = first + index * RUNS
        value = tl.load(own_values + run * 4, mask=row_here & (run * 4 + quad < runs * 4), other=0)
        here = row_here & (run + tl.arange(0, RUNS)[None, :] < runs)
        word = tl.load(own_bits + run, mask=here, other=0).to(tl.int32)
        if PAIRS:
            low, high = _quads(tl.reshape(value, (ROWS, RUNS, 4)), word[:, :, None], number, INTERPRETED)
            w0, w1 = _halves(low, kind)
            w2, w3 = _halves(high, kind)
            weight = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        else:
            even, odd = tl.split(tl.reshape(value, (ROWS, RUNS, 2, 2)))
            v0, v2 = tl.split(even)
            v1, v3 = tl.split(odd)
            c0, c1, c2, c3, c4, c5, c6, c7 = _streamed(v0, v1, v2, v3, word, INTERPRETED)
            # Joins columns 8 apart, then 4 apart, then 2 apart.
            near = tl.join(tl.join(tl.join(c0, c4), tl.join(c2, c6)), tl.join(tl.join(c1, c5), tl.join(c3, c7)))
            w0, w1 = _halves(near, kind)
            weight = tl.join(w0, w1)
        at = run * 16 + column
        x_here = (token < tokens)[:, None] & (at < runs * 16)[None, :]
        x_tile = tl.load(x + token[:, None] * runs * 16 + at[None, :], mask=x_here, other=0.0)
        weight = tl.reshape(weight, (ROWS, RUNS * 16))
        if INTERPRETED:  # the interpreter multiplies bfloat16 as if it were integers
            weight, x_tile = weight.to(tl.float32), x_tile.to(tl.float32)
        total = tl.dot(weight, tl.trans(x_tile), total)
    at = out + (tl.program_id(1) * tokens + token[None, :]) * rows + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])
