"""What quantised matrices take, by hand."""

from __future__ import annotations

import pytest

from esparse import option
from esparse.packed.grid_sizes import file_bytes, file_shapes, stored_bits
from esparse.patterns import parse


def test_two_of_four_in_int4_by_hand() -> None:
    bits = stored_bits(parse("2:4"), 8, 128, option("quantise", "int4"))
    assert bits == {
        "values": 8 * 64 * 4,
        "index": 8 * 32 * 3,
        "scales": 8 * 2 * 16,
        "zero_points": 0,
        "outliers": 0,
        "padding": 0,
        "orders": 0,
    }
    assert sum(bits.values()) / (8 * 128) == 2 + 0.75 + 0.25


def test_zero_points_padding_and_outliers_by_hand() -> None:
    grid = option("quantise", "int3", group=None, symmetric=False)
    bits = stored_bits(parse("2:4"), 5, 12, grid)  # 6 values of 3 bits: 18 in 3 bytes; a zero point of 3 in one
    assert (bits["values"], bits["zero_points"], bits["scales"]) == (90, 15, 80)
    assert bits["index"] == 5 * 3 * 3 and bits["padding"] == 5 * (6 + 5) + 3  # 45 bits of the index in 6 bytes
    grid = option("quantise", "int4", group=None)
    bits = stored_bits(parse("8:16", "16:256"), 2, 256, grid)
    assert bits["outliers"] == 2 * (16 * 16 + 128) and bits["values"] == 2 * 128 * 4
    as_codes = option("quantise", "int4", group=None, outlier_bits=None)
    assert stored_bits(parse("8:16", "16:256"), 2, 256, as_codes)["outliers"] == 2 * (16 * 4 + 128)


def test_without_groups_the_fewest_bits_are_counted() -> None:
    grid = option("quantise", "int8", scale="float32")
    assert sum(stored_bits(parse("dense"), 3, 10, grid).values()) == 3 * (10 * 8 + 32)
    assert sum(stored_bits(parse("50%"), 3, 10, grid, kept=15).values()) == 15 * 8 + 30 + 3 * 32


@pytest.mark.parametrize("pattern", ["dense", "2:4", "8:16", "3:7"])
@pytest.mark.parametrize("quantise", ["int8", "int4", "int3", "fp8", "nf4"])
def test_the_parts_are_the_bytes_of_the_tensors(pattern: str, quantise: str) -> None:
    grid = option("quantise", quantise, group=None)
    assert sum(stored_bits(parse(pattern), 7, 50, grid).values()) == 8 * file_bytes(parse(pattern), 7, 50, grid)
    assert file_shapes(parse(pattern), 7, 50, grid)["scales"] == (7, 2)
