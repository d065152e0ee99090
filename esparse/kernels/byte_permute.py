"""Permutes bytes in registers (PTX `prmt`), with tables of selectors for n:m; the plain form is for the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


def _table(entries: list[int]) -> tl.constexpr:
    """Up to four bytes as one int32."""
    number = sum(byte << 8 * i for i, byte in enumerate(entries))
    return tl.constexpr(number - (number >> 31 << 32))


# The lower three bits tell the two set bits of four: 1 (bits 0, 3), 2 (1, 3), 3 (0, 1), 4 (2, 3), 5 (0, 2), 6 (1, 2).
# The bytes of the input that the first value is multiplied by, and the second one.
FIRST_LOW, FIRST_HIGH = _table([0, 0x10, 0x32, 0x10]), _table([0x54, 0x10, 0x32, 0])
SECOND_LOW, SECOND_HIGH = _table([0, 0x76, 0x76, 0x32]), _table([0x76, 0x54, 0x54, 0])
# The bytes of the two values (0x10, 0x32), or of a zero (0x44), for columns 0 to 3.
COLUMN0_LOW, COLUMN0_HIGH = _table([0x44, 0x10, 0x44, 0x10]), _table([0x44, 0x10, 0x44, 0x44])
COLUMN1_LOW, COLUMN1_HIGH = _table([0x44, 0x44, 0x10, 0x32]), _table([0x44, 0x44, 0x10, 0x44])
COLUMN2_LOW, COLUMN2_HIGH = _table([0x44, 0x44, 0x44, 0x44]), _table([0x10, 0x32, 0x32, 0x44])
COLUMN3_LOW, COLUMN3_HIGH = _table([0x44, 0x32, 0x32, 0x44]), _table([0x32, 0x44, 0x44, 0x44])
# For two columns, by their two keep bits: which of the next values each takes, and how many bits of them are used up.
EVEN, ODD, USED = _table([0x44, 0x10, 0x44, 0x10]), _table([0x44, 0x44, 0x10, 0x32]), _table([0, 16, 16, 32])


@triton.jit
def permuted(low, high, selector, INTERPRETED: tl.constexpr):
    """Four of the eight bytes of (high, low), each chosen by four bits of the selector."""
    if INTERPRETED:
        both = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
        result = (low ^ low).to(tl.int64) + (selector ^ selector).to(tl.int64)
        for i in tl.static_range(4):
            byte = (both >> (8 * ((selector >> (4 * i)) & 7)).to(tl.int64)) & 255
            result |= byte << (8 * i)
        return result.to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def shifted(low, high, count, INTERPRETED: tl.constexpr):
    """The lower register of (high, low) after a shift to the right by 0 to 32 bits."""
    if INTERPRETED:
        both = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
        return (both >> count.to(tl.int64)).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "shf.r.clamp.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, count], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def looked_up(LOW: tl.constexpr, HIGH: tl.constexpr, word, INTERPRETED: tl.constexpr):
    """Four entries of a table of eight bytes, each chosen by four bits of the word."""
    zero = word ^ word
    return permuted(zero + LOW, zero + HIGH, word, INTERPRETED)


@triton.jit
def wide(pair, BFLOAT: tl.constexpr):
    """Both halves of a register, as float32."""
    if BFLOAT:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)
