"""Expands the compute form to a dense matrix on the GPU, for tensor cores without sparsity."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esparse.kernels.current import on_its_gpu
from esparse.kernels.form import units
from esparse.kernels.gemv import expanded, words
from esparse.kernels.registers import interpreted


@on_its_gpu
def decode(values_RK: Tensor, bits_RB: Tensor, inputs: int, *, n: int, m: int, out_RI: Tensor | None = None) -> Tensor:
    """The dense matrix (R x inputs), written into `out_RI` if given; bitwise equal to form.to_dense.

    Raises ValueError if the kernels cannot cut n:m (form.units).
    """
    cut = units(n, m)
    if cut is None:
        raise ValueError(f"no kernel for {n}:{m}: it takes n up to 16 and m up to 32")
    rows, kept = values_RK.shape
    if out_RI is None:
        out_RI = torch.empty(rows, inputs, dtype=values_RK.dtype, device=values_RK.device)
    run_bits, word = words(bits_RB, inputs, cut)
    runs = -(-inputs // cut.columns)
    tile_rows, depth = 8, 16
    _decode_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(runs, depth))](
        values_RK,
        run_bits,
        out_RI,
        rows,
        inputs,
        kept,
        run_bits.stride(0),
        COLUMNS=cut.columns,
        RUN_KEPT=cut.kept,
        WORD=word,
        WIDTH=triton.next_power_of_2(cut.columns),
        ROWS=tile_rows,
        RUNS=depth,
        INTERPRETED=interpreted(),
        num_warps=4,
    )
    return out_RI


@triton.jit
def _decode_kernel(
    values,
    bits,
    out,
    rows,
    inputs,
    kept,
    bit_stride,
    COLUMNS: tl.constexpr,
    RUN_KEPT: tl.constexpr,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    run = (tl.program_id(1) * RUNS + tl.arange(0, RUNS))[None, :]
    place = tl.arange(0, WIDTH)[None, None, :]
    dense = expanded(
        values, bits, row, run, rows, inputs, kept, bit_stride, COLUMNS, RUN_KEPT, WORD, WIDTH, INTERPRETED
    )
    column = run[:, :, None] * COLUMNS + place
    fits = (row < rows)[:, :, None] & (place < COLUMNS) & (column < inputs)
    tl.store(out + row[:, :, None].to(tl.int64) * inputs + column, dense, mask=fits)
