"""Products of packed weights on a CPU, compiled by numba (extra `cpu`).

A piece of a row is made dense in a core's cache and multiplied there. If the CPU has AVX-512 (VBMI2 for 16 bits), one
instruction spreads the kept weights over 32 columns; without it they are put into their places one by one.

The loops take flat arrays. numba has no 16-bit floating point, so bfloat16 comes as uint16 and float16 as int16.

Shapes: T tokens, O outputs, I inputs, K kept weights of a row, S outliers, B bytes of a row's bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

COLUMNS = 1024  # of a row made dense at one time: they and the inputs of some tokens fit into the first cache
LANES = 32  # columns per word of keep bits
ALONE = 2**18  # up to this many weights, a second thread does not pay
STORED = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}


Outliers = tuple[Tensor, Tensor, Tensor]  # values and places (O x S), and the column each place counts from (S)


def product(values_OK: Tensor, bits_OB: Tensor, x_TI: Tensor, outliers: Outliers | None = None) -> Tensor:
    """x @ W^T (T x O) in float32, for a few tokens; reads the weights once."""
    (outputs, kept), (tokens, inputs) = values_OK.shape, x_TI.shape
    x = x_TI.float().contiguous().view(-1).numpy()
    y_OT = np.empty((outputs, tokens), np.float32)
    arrays = _arrays(values_OK, bits_OB, outliers)
    vectors = vectors_for(values_OK.dtype)

    def rows(first: int, end: int) -> None:
        _product(*arrays, x, y_OT, kept, inputs, first, end, vectors)

    _on_each_core(rows, outputs, inputs)
    return torch.from_numpy(y_OT).T


def dense(values_OK: Tensor, bits_OB: Tensor, outliers: Outliers | None, inputs: int, rows: slice) -> Tensor:
    """Some rows, dense."""
    kept, stored = values_OK.shape[1], STORED[values_OK.dtype]
    weight_OI = torch.empty(rows.stop - rows.start, inputs, dtype=values_OK.dtype)
    out = weight_OI.view(stored).view(-1).numpy()
    arrays = _arrays(values_OK, bits_OB, outliers)
    vectors = vectors_for(values_OK.dtype)

    def some(start: int, stop: int) -> None:
        _expand(*arrays, out, kept, inputs, rows.start + start, rows.start + stop, rows.start, vectors)

    _on_each_core(some, len(weight_OI), inputs)
    return weight_OI


@cache
def vectors_for(dtype: torch.dtype) -> bool:
    """Whether this CPU spreads 32 values of this dtype with one instruction."""
    return ("avx512f" if dtype == torch.float32 else "avx512vbmi2") in features()


@cache
def takes(dtype: torch.dtype) -> bool:
    """Whether the loops support this dtype on this CPU: float16 needs the CPU's conversion instructions."""
    if dtype == torch.float16:
        return "f16c" in features() or binding.get_process_triple().startswith("aarch64")
    return dtype in STORED


def features() -> set[str]:
    """What numba may use of this CPU: with NUMBA_CPU_NAME=generic, one cache for many machines, less than there is."""
    if config.CPU_FEATURES is not None:
        return {name.removeprefix("+") for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    return {name for name, there in binding.get_host_cpu_features().items() if there}


def _arrays(values_OK: Tensor, bits_OB: Tensor, outliers: Outliers | None) -> tuple[Any, ...]:
    """The arguments of the loops: values, bits and outliers (empty arrays without any)."""
    stored = STORED[values_OK.dtype]
    values = values_OK.detach().view(stored).view(-1).numpy()
    bits = bits_OB.view(-1).numpy()
    if outliers is None:
        return values, bits, bits_OB.shape[1], values[:0], bits[:0], NO_STARTS
    values_OS, places_OS, starts_S = outliers
    of_salient = values_OS.detach().view(stored).view(-1).numpy()
    return values, bits, bits_OB.shape[1], of_salient, places_OS.view(-1).numpy(), starts_S.numpy()


NO_STARTS = np.empty(0, np.int64)


def _on_each_core(rows: Callable[[int, int], None], outputs: int, inputs: int) -> None:
    threads = min(torch.get_num_threads(), outputs) if outputs * inputs > ALONE else 1
    ends = [outputs * part // threads for part in range(threads + 1)]
    if threads == 1:
        rows(0, outputs)
        return
    others = [_pool(os.getpid(), threads).submit(rows, *ends[part : part + 2]) for part in range(1, threads)]
    rows(*ends[:2])
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that are reused, because starting one takes as long as a small layer; a forked process gets its own."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="esparse")


@intrinsic
def _spread(typing: Any, values: Any, first: Any, word: Any, out: Any, place: Any) -> Any:
    """out[place : place + 32] = the next values of values[first:] at the word's 1 bits, zeros at its 0 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given, taken = signature.args[0], signature.args[3]
        source = builder.gep(context.make_array(given)(context, builder, args[0]).data, [args[1]])
        target = builder.gep(context.make_array(taken)(context, builder, args[3]).data, [args[4]])
        vector = _spread_lanes(context, builder, given, source, builder.trunc(args[2], ir.IntType(LANES)))
        if given.dtype != taken.dtype:
            vector = _widened(builder, vector, given.dtype, LANES)
        builder.store(vector, builder.bitcast(target, vector.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(values, first, word, out, place), codegen


@intrinsic
def _accumulate(
    typing: Any, values: Any, first: Any, bits: Any, byte: Any, words: Any, x: Any, column: Any, sums: Any
) -> Any:
    """Adds x[column:] times some words of a row to the 32 sums, lane by lane; returns the index of the next value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given, word_type = signature.args[0], ir.IntType(LANES)
        data = [context.make_array(signature.args[k])(context, builder, args[k]).data for k in (0, 2, 5, 7)]
        lanes = ir.VectorType(ir.FloatType(), LANES)
        total, at = (cgutils.alloca_once(builder, kind) for kind in (lanes, ir.IntType(64)))
        target = builder.bitcast(data[3], lanes.as_pointer())
        builder.store(builder.load(target, align=4), total)
        builder.store(args[1], at)
        bytes_at = builder.gep(data[1], [args[3]])
        inputs_at = builder.gep(data[2], [args[6]])
        with cgutils.for_range(builder, args[4]) as loop:
            word_at = builder.gep(builder.bitcast(bytes_at, word_type.as_pointer()), [loop.index])
            word = builder.load(word_at, align=1)
            vector = _spread_lanes(context, builder, given, builder.gep(data[0], [builder.load(at)]), word)
            part = builder.load(builder.gep(builder.bitcast(inputs_at, lanes.as_pointer()), [loop.index]), align=4)
            product = builder.fmul(_widened(builder, vector, given.dtype, LANES), part, flags=("fast",))
            builder.store(builder.fadd(builder.load(total), product, flags=("fast",)), total)
            taken = builder.zext(builder.ctpop(word), ir.IntType(64))
            builder.store(builder.add(builder.load(at), taken), at)
        builder.store(builder.load(total), target, align=4)
        return builder.load(at)

    return types.int64(values, first, bits, byte, words, x, column, sums), codegen


def _spread_lanes(context: Any, builder: Any, given: Any, source: Any, word: Any) -> Any:
    """The next values at the word's 1 bits, zeros at its 0 bits (32), as stored; reads no value beyond them."""
    lanes = ir.VectorType(context.get_value_type(given.dtype), LANES)
    mask = builder.bitcast(word, ir.VectorType(ir.IntType(1), LANES))
    kind = ir.FunctionType(lanes, [source.type, mask.type, lanes])
    name = f"llvm.masked.expandload.v{LANES}{'f32' if given.dtype == types.float32 else 'i16'}"
    spread = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(spread, [source, mask, ir.Constant(lanes, None)])


@intrinsic
def _wide(typing: Any, value: Any) -> Any:
    """Converts a stored value to float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _widened(builder, args[0], signature.args[0], 1)

    return types.float32(value), codegen


def _widened(builder: Any, value: Any, stored: Any, lanes: int) -> Any:
    """Converts stored values to float32; bfloat16 is the upper half of a float32."""

    def of(element: Any) -> Any:
        return element if lanes == 1 else ir.VectorType(element, lanes)

    if stored == types.float32:
        return value
    if stored == types.int16:
        return builder.fpext(builder.bitcast(value, of(ir.HalfType())), of(ir.FloatType()))
    upper = builder.zext(value, of(ir.IntType(32)))
    sixteen = ir.Constant(of(ir.IntType(32)), 16 if lanes == 1 else [16] * lanes)
    return builder.bitcast(builder.shl(upper, sixteen), of(ir.FloatType()))


@intrinsic
def _lowest(typing: Any, word: Any) -> Any:
    """The index of a word's lowest 1 bit."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return word(word), codegen


@intrinsic
def _count(typing: Any, word: Any) -> Any:
    """The number of a word's 1 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return word(word), codegen


@njit(nogil=True, cache=True)
def _word(bits: Any, first: int, end: int) -> Any:
    """The bytes `first` to `end`, at most four, as one number (uint64)."""
    word = np.uint64(0)
    for byte in range(min(4, end - first)):
        word |= np.uint64(bits[first + byte]) << np.uint64(8 * byte)
    return word


@njit(nogil=True, cache=True)
def _whole_word(bits: Any, first: int) -> Any:
    return (
        np.uint64(bits[first])
        | np.uint64(bits[first + 1]) << np.uint64(8)
        | np.uint64(bits[first + 2]) << np.uint64(16)
        | np.uint64(bits[first + 3]) << np.uint64(24)
    )


@njit(nogil=True, fastmath=True, cache=True)
def _product(
    values: Any, bits: Any, row_bytes: int, outliers: Any, places: Any, starts: Any,
    x: Any, y_OT: Any, kept: int, inputs: int, first: int, end: int, vectors: bool,
) -> None:  # fmt: skip
    piece, stored, sums = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, values.dtype), np.empty(LANES, np.float32)
    tokens, runs = y_OT.shape[1], len(starts)
    at: Any
    for row in range(first, end):
        at, done, number = row * kept, 0, 0
        for token in range(tokens):
            y_OT[row, token] = 0.0
        if vectors and tokens == 1 and runs == 0:  # whole words never leave the registers
            done = inputs - inputs % LANES
            sums[:] = 0
            at = _accumulate(values, at, bits, row * row_bytes, done // LANES, x, 0, sums)
            y_OT[row, 0] = sums.sum()
        for start in range(done, inputs, COLUMNS):
            columns = min(COLUMNS, inputs - start)
            byte, last = row * row_bytes + start // 8, (row + 1) * row_bytes
            if vectors:
                at = _spread_piece(values, at, bits, byte, last, piece, columns)
            else:
                at = _put_piece(values, at, bits, byte, last, piece, stored, columns)
            while number < runs:
                place = np.uint64(row * runs + number)
                there = np.int64(starts[np.uint64(number)]) + np.int64(places[place])
                if there >= start + columns:
                    break
                piece[np.uint64(there - start)] += _wide(outliers[place])
                number += 1
            for token in range(tokens):
                x_part = x[token * inputs + start : token * inputs + start + columns]
                total = np.float32(0.0)
                for column in range(columns):
                    total += piece[column] * x_part[column]
                y_OT[row, token] += total


@njit(nogil=True, cache=True)
def _spread_piece(values: Any, at: Any, bits: Any, byte: int, end: int, piece: Any, columns: int) -> Any:
    """Writes a piece of a row, dense, from the values `at` on; returns the index of the next value."""
    for column in range(0, columns, LANES):
        word = _whole_word(bits, byte) if byte + 4 <= end else _word(bits, byte, end)
        byte += 4
        _spread(values, at, word, piece, column)
        at += np.int64(_count(word))
    return at


@njit(nogil=True, cache=True)
def _put_piece(values: Any, at: Any, bits: Any, byte: int, end: int, piece: Any, stored: Any, columns: int) -> Any:
    """Does the same without a spreading instruction: puts the values as `stored`, then widens all of them at once."""
    stored[:columns] = 0
    for column in range(0, columns, LANES):
        word = _whole_word(bits, byte) if byte + 4 <= end else _word(bits, byte, end)
        byte += 4
        at = _put(values, at, word, stored, column)
    for column in range(columns):
        piece[column] = _wide(stored[column])
    return at


@njit(nogil=True, cache=True)
def _put(values: Any, at: Any, word: Any, out: Any, place: int) -> Any:
    """Puts the values of a word's 1 bits into their places from `place` on, one by one; returns the next index."""
    here, base = np.uint64(at), np.uint64(place)  # numba would check signed indices for being negative
    while word:
        out[base + _lowest(word)] = values[here]
        word &= word - np.uint64(1)
        here += np.uint64(1)
    return np.int64(here)


@njit(nogil=True, cache=True)
def _expand(
    values: Any, bits: Any, row_bytes: int, outliers: Any, places: Any, starts: Any,
    out: Any, kept: int, inputs: int, first: int, end: int, offset: int, vectors: bool,
) -> None:  # fmt: skip
    at: Any
    for row in range(first, end):
        at, byte, last = row * kept, row * row_bytes, (row + 1) * row_bytes
        begin = (row - offset) * inputs
        whole = inputs - inputs % LANES if vectors else 0
        for column in range(0, whole, LANES):
            word = _whole_word(bits, byte)
            byte += 4
            _spread(values, at, word, out, begin + column)
            at += np.int64(_count(word))
        out[begin + whole : begin + inputs] = 0
        for column in range(whole, inputs, LANES):
            word = _whole_word(bits, byte) if byte + 4 <= last else _word(bits, byte, last)
            byte += 4
            at = _put(values, at, word, out, begin + column)
        for number in range(len(starts)):
            place = np.uint64(row * len(starts) + number)
            if _wide(outliers[place]) != 0:  # an outlier place without a value: the base may have a weight there
                out[np.uint64(begin + starts[np.uint64(number)] + np.int64(places[place]))] = outliers[place]
