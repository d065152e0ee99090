"""What a CPU does with 32 codes at once, in LLVM's words: unpacking, spreading over columns, multiplying."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from esparse.kernels.compiled import LANES


@intrinsic
def spread_codes(typing: Any, codes: Any, first: Any, word: Any, fill: Any, out: Any, place: Any) -> Any:
    """out[place : place + 32] = the next codes of codes[first:] at the word's 1 bits, `fill` at its 0 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])
        target = builder.gep(context.make_array(signature.args[4])(context, builder, args[4]).data, [args[5]])
        vector = _spread_bytes(builder, source, builder.trunc(args[2], ir.IntType(LANES)), args[3])
        builder.store(vector, builder.bitcast(target, vector.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(codes, first, word, fill, out, place), codegen


@intrinsic
def accumulate_levels(
    typing: Any, codes: Any, first: Any, keep: Any, byte: Any, words: Any, zero: Any, scale: Any, x: Any, column: Any,
    sums: Any,
) -> Any:  # fmt: skip
    """Adds scale * (code - zero) * x[column:] of some words of a row to the 32 sums; returns the next code's index."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = [context.make_array(signature.args[k])(context, builder, args[k]).data for k in (0, 2, 7, 9)]
        word_type, lanes = ir.IntType(LANES), ir.VectorType(ir.FloatType(), LANES)
        sixteen = ir.VectorType(ir.IntType(16), LANES)
        total, at = (cgutils.alloca_once(builder, kind) for kind in (lanes, ir.IntType(64)))
        builder.store(ir.Constant(lanes, None), total)
        builder.store(args[1], at)
        words_at = builder.bitcast(builder.gep(data[1], [args[3]]), word_type.as_pointer())
        inputs_at = builder.bitcast(builder.gep(data[2], [args[8]]), lanes.as_pointer())
        zeros = _splat(builder, builder.trunc(args[5], ir.IntType(16)))
        with cgutils.for_range(builder, args[4]) as loop:
            word = builder.load(builder.gep(words_at, [loop.index]), align=1)
            code = _spread_bytes(builder, builder.gep(data[0], [builder.load(at)]), word, args[5])
            level = builder.sitofp(builder.sub(builder.zext(code, sixteen), zeros), lanes)
            part = builder.load(builder.gep(inputs_at, [loop.index]), align=4)
            met = builder.fmul(level, part, flags=("fast",))
            builder.store(builder.fadd(builder.load(total), met, flags=("fast",)), total)
            taken = builder.zext(builder.ctpop(word), ir.IntType(64))
            builder.store(builder.add(builder.load(at), taken), at)
        target = builder.bitcast(data[3], lanes.as_pointer())
        scaled = builder.fmul(builder.load(total), _splat(builder, args[6]), flags=("fast",))
        builder.store(builder.fadd(builder.load(target, align=4), scaled, flags=("fast",)), target, align=4)
        return builder.load(at)

    return types.int64(codes, first, keep, byte, words, zero, types.float32, x, column, sums), codegen


def _spread_bytes(builder: Any, source: Any, word: Any, fill: Any) -> Any:
    """The next bytes at the word's 1 bits, `fill` at its 0 bits (32); reads no byte beyond them."""
    lanes = ir.VectorType(ir.IntType(8), LANES)
    mask = builder.bitcast(word, ir.VectorType(ir.IntType(1), LANES))
    kind = ir.FunctionType(lanes, [source.type, mask.type, lanes])
    spread = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.expandload.v{LANES}i8")
    return builder.call(spread, [source, mask, _splat(builder, builder.trunc(fill, ir.IntType(8)))])


@intrinsic
def eight_bytes(typing: Any, codes: Any, first: Any) -> Any:
    """Eight bytes as one number (uint64)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])
        return builder.load(builder.bitcast(source, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(codes, first), codegen


@intrinsic
def unpack_halves(typing: Any, codes: Any, first: Any, times: Any, out: Any) -> Any:
    """Writes the halves of 16 bytes behind one another, the lower ones first, so many times."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])
        target = context.make_array(signature.args[3])(context, builder, args[3]).data
        pairs, halves = (ir.VectorType(ir.IntType(8), lanes) for lanes in (LANES // 2, LANES))
        pairs_at, halves_at = (
            builder.bitcast(at, kind.as_pointer()) for at, kind in ((source, pairs), (target, halves))
        )
        fifteen, four = (ir.Constant(pairs, [number] * (LANES // 2)) for number in (15, 4))
        turns = [place // 2 + place % 2 * (LANES // 2) for place in range(LANES)]
        with cgutils.for_range(builder, args[2]) as loop:
            pair = builder.load(builder.gep(pairs_at, [loop.index]), align=1)
            low, high = builder.and_(pair, fifteen), builder.lshr(pair, four)
            both = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(ir.IntType(32), LANES), turns))
            builder.store(both, builder.gep(halves_at, [loop.index]), align=1)
        return context.get_dummy_value()

    return types.void(codes, first, times, out), codegen


def _splat(builder: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))
