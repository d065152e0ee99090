"""Quantised matrices on disk: the same values come back to the bit, at the size that is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse import option
from esparse.packed.grid_sizes import file_bytes, file_shapes
from esparse.packed.quantised import from_file, stream, to_file, unstream
from esparse.patterns import parse

PATTERNS = [("2:4", None), ("8:16", None), ("3:7", None), ("dense", None), ("2:4", "1:16"), ("8:16", "4:64")]


@given(bits=st.integers(2, 8), rows=st.integers(1, 4), count=st.integers(1, 30), seed=st.integers(0, 99))
def test_streams_are_read_back(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    written = stream(codes, bits)
    assert written.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unstream(written, count, bits), codes)


def test_a_stream_by_hand() -> None:
    assert stream(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert stream(torch.tensor([[7, 0, 1]], dtype=torch.uint8), 3).tolist() == [[0b01000111, 0]]


@pytest.mark.parametrize("quantise", ["int8", "int4", "int3", "fp8", "nf4"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_comes_back_to_the_bit(quantise: str, pattern: tuple[str, str | None], dtype: torch.dtype) -> None:
    parsed = parse(*pattern)
    for changes in ({}, {"outlier_bits": None}, {"symmetric": False}):
        if "symmetric" in changes and not quantise.startswith("int"):
            continue
        grid = option("quantise", quantise, group=32, **changes)
        weight_OI = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
        keep_OI = parsed.keep_top(weight_OI.abs())
        rounded_OI, scales = grid.nearest(weight_OI, keep_OI, parsed)
        stored_OI = rounded_OI.to(dtype) + 0.0
        tensors = to_file(stored_OI, parsed, grid, scales)
        again = from_file(tensors, parsed, 64, grid)
        assert torch.equal(again.dense(dtype=dtype), stored_OI)
        assert torch.equal(again.dense(1, 4, dtype), stored_OI[1:4])
        assert {name: tuple(value.shape) for name, value in tensors.items()} == file_shapes(parsed, 5, 64, grid)
        assert sum(value.nbytes for value in tensors.values()) == file_bytes(parsed, 5, 64, grid)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("group", [8, 64])
def test_values_far_from_zero_come_back_from_eight_bits_of_precision(
    pattern: tuple[str, str | None], group: int
) -> None:
    """At a power of two bfloat16's precision halves, and the nearest code is not the weight's own."""
    grid, parsed = option("quantise", "int8", group=group, symmetric=False, outlier_bits=None), parse(*pattern)
    weight_OI = torch.randn(512, 64, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.1
    rounded_OI, scales = grid.nearest(weight_OI, parsed.keep_top(weight_OI.abs()), parsed)
    stored_OI = rounded_OI.bfloat16() + 0.0
    again = from_file(to_file(stored_OI, parsed, grid, scales), parsed, 64, grid)
    assert torch.equal(again.dense(dtype=torch.bfloat16), stored_OI)


def test_what_is_not_on_the_grid_or_is_damaged_is_refused() -> None:
    grid, pattern = option("quantise", "int4", group=32), parse("2:4")
    weight_OI = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    rounded_OI, scales = grid.nearest(weight_OI, pattern.keep_top(weight_OI.abs()), pattern)
    with pytest.raises(ValueError, match="do not lie on the grid of 4 bits"):
        to_file(rounded_OI * 1.01, pattern, grid, scales)
    tensors = to_file(rounded_OI, pattern, grid, scales)
    for damage in (float("nan"), float("inf"), 0.0, -1.0):
        scales_OG = tensors["scales"].view(torch.float16).clone()
        scales_OG[1, 1] = damage
        with pytest.raises(ValueError, match="a scale is not a positive number"):
            from_file(tensors | {"scales": scales_OG.view(torch.uint8)}, pattern, 64, grid)


@pytest.mark.parametrize("pattern", ["2:4", "dense"])
@pytest.mark.parametrize("code", [127, 255])
def test_codes_of_no_number_are_refused(pattern: str, code: int) -> None:
    """fp8 has two codes of NaN; the other grids have none."""
    grid, parsed = option("quantise", "fp8", group=32, outlier_bits=None), parse(pattern)
    parsed = parse("2:4", "4:16") if pattern == "2:4" else parsed
    weight_OI = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    rounded_OI, scales = grid.nearest(weight_OI, parsed.keep_top(weight_OI.abs()), parsed)
    tensors = to_file(rounded_OI, parsed, grid, scales)
    for name in (name for name in tensors if name.endswith("codes")):
        damaged = tensors[name].clone()
        damaged[1, 2] = code
        with pytest.raises(ValueError, match=f"one of its codes is {code}, which stands for no number"):
            from_file(tensors | {name: damaged}, parsed, 64, grid)


def test_outliers_beside_codes_are_numbers() -> None:
    grid, pattern = option("quantise", "int8", group=32), parse("2:4", "1:16")
    weight_OI = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    rounded_OI, scales = grid.nearest(weight_OI, pattern.keep_top(weight_OI.abs()), pattern)
    tensors = to_file(rounded_OI, pattern, grid, scales)
    tensors["salient_values"][1, 1] = torch.inf
    with pytest.raises(ValueError, match="a number of its salient_values is NaN or Inf"):
        from_file(tensors, pattern, 64, grid)


def test_few_nonzeros_are_stored_once() -> None:
    """Outliers in as many bits as the others: if values were rounded to 0, both parts would choose the same places."""
    grid, pattern = option("quantise", "int4", group=None, outlier_bits=None), parse("2:4", "1:16")
    for seed in range(5):
        weight_OI = torch.randn(5, 37, generator=torch.Generator().manual_seed(seed))
        rounded_OI, scales = grid.nearest(weight_OI, pattern.keep_top(weight_OI.abs()), pattern)
        tensors = to_file(rounded_OI + 0.0, pattern, grid, scales)
        assert torch.equal(from_file(tensors, pattern, 37, grid).dense(), rounded_OI + 0.0)
