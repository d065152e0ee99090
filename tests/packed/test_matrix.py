"""Packed matrices: what goes in comes out, in exactly the bits that the pattern needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esparse import patterns
from esparse.kernels.form import packed_bits
from esparse.packed import codes, matrix
from esparse.packed.matrix import from_file, pack, starts, to_file
from esparse.patterns import NM

PATTERNS = [
    ("2:4", None),
    ("4:8", None),
    ("8:16", None),
    ("1:4", None),
    ("3:5", None),
    ("16:32", None),
    ("32:64", None),
]
PATTERNS += [("2:4", "4:16"), ("8:16", "2:64"), ("8:16", "16:256"), ("2:4", "30:1024")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pruned(pattern: patterns.Pattern, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    keep_OI = pattern.keep_top(torch.rand(outputs, inputs, generator=generator))
    return weight_OI.masked_fill(~keep_OI, 0.0).to(dtype)


@pytest.mark.parametrize("inputs", [2048, 2048 + 7, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
def test_what_goes_in_comes_out(asked: tuple[str, str | None], dtype: torch.dtype, inputs: int) -> None:
    pattern = patterns.parse(*asked)
    weight_OI = pruned(pattern, 9, inputs, dtype)
    packed = pack(weight_OI, pattern)
    again = from_file(to_file(packed), pattern, inputs)
    for one in (packed, again):
        assert one.values_OK.dtype == dtype
        assert torch.equal(one.dense(), weight_OI)
        assert not one.dense().signbit().logical_and(weight_OI == 0).any()
        assert torch.equal(one.dense(3, 7), weight_OI[3:7])
    assert again.nbytes == packed.nbytes == matrix.empty(pattern, 9, inputs, dtype, torch.device("meta")).nbytes
    shapes = {name: tuple(value.shape) for name, value in to_file(packed).items()}
    assert shapes == matrix.file_shapes(pattern, 9, inputs)


@given(n=st.integers(1, 8), more=st.integers(1, 8), outputs=st.integers(1, 5), inputs=st.integers(1, 70))
def test_any_pattern_and_any_shape(n: int, more: int, outputs: int, inputs: int) -> None:
    pattern = NM(n, n + more)
    weight_OI = pruned(pattern, outputs, inputs, torch.float32)
    tensors = to_file(pack(weight_OI, pattern))
    assert torch.equal(from_file(tensors, pattern, inputs).dense(), weight_OI)
    # Whole groups and tails are each filled to a byte.
    needed = pattern.metadata_bits(outputs, inputs)
    assert needed <= 8 * len(tensors["index"]) <= needed + 14


@pytest.mark.parametrize(("text", "bits"), [("2:4", 0.75), ("4:8", 0.875), ("8:16", 0.875), ("16:32", 30 / 32)])
def test_bits_per_weight_are_reached_exactly(text: str, bits: float) -> None:
    pattern = patterns.parse(text)
    tensors = to_file(pack(pruned(pattern, 64, 256, torch.float16), pattern))
    assert 8 * tensors["index"].nbytes == bits * 64 * 256
    assert tensors["values"].nbytes == 64 * 256  # half of them, in two bytes each


def test_outlier_places_take_half_a_bit_per_weight() -> None:
    pattern = patterns.parse("8:16", "16:256")
    packed = pack(pruned(pattern, 8, 1024, torch.float16), pattern)
    tensors = to_file(packed)
    assert 8 * tensors["salient_index"].nbytes == 0.5 * 8 * 1024
    assert packed.outlier_places_OS is not None and packed.outlier_places_OS.dtype == torch.uint8


def test_the_form_in_memory_by_hand() -> None:
    weight_OI = torch.tensor([[0, 5, 6, 0, 7, 0, 0, 8, 9.0]])
    packed = pack(weight_OI, NM(2, 4))
    assert packed.values_OK.tolist() == [[5, 6, 7, 8, 9]]  # of the tail's one weight, ceil(1 * 2 / 4) survive
    assert packed.bits_OB.tolist() == [[0b10010110, 0b1]]


def test_groups_with_fewer_survivors_are_filled_with_zeros() -> None:
    weight_OI = torch.tensor([[0, 0, 0, 3.0, 0, -0.0, 0, 0]])
    packed = pack(weight_OI, NM(2, 4))
    assert packed.values_OK.tolist() == [[0, 3, 0, 0]]
    assert not packed.dense().signbit().any()
    assert torch.equal(packed.bits_OB, packed_bits(torch.tensor([[1, 0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)))


def test_outlier_places_without_a_weight_add_nothing() -> None:
    pattern = patterns.parse("2:4", "6:8")
    weight_OI = torch.tensor([[1.0, 2, 0, 0, 3, 4, 5, 0], [0, 0, 0, 0, 0, 0, 0, 6]])
    packed = pack(weight_OI, pattern)
    assert packed.outlier_values_OS is not None and packed.outlier_values_OS.sum() == 5
    assert torch.equal(packed.dense(), weight_OI)
    assert torch.equal(from_file(to_file(packed), pattern, 8).dense(), weight_OI)


def test_weights_that_do_not_hold_the_pattern_are_refused() -> None:
    with pytest.raises(ValueError, match="do not hold 2:4"):
        pack(torch.ones(2, 8), NM(2, 4))
    with pytest.raises(ValueError, match="no groups of n:m"):
        pack(torch.zeros(2, 8), patterns.parse("50%"))
    with pytest.raises(ValueError, match=r"do not hold 2:4\+1:8"):
        pack(torch.ones(2, 8), patterns.parse("2:4", "1:8"))


@pytest.mark.parametrize("text", ["2:4", "40:128"])
def test_an_index_that_names_no_choice_is_refused(text: str) -> None:
    pattern = patterns.parse(text)
    tensors = to_file(pack(pruned(pattern, 4, 128, torch.float32), pattern))
    tensors["index"] = torch.full_like(tensors["index"], 255)
    with pytest.raises(ValueError, match="damaged"):
        from_file(tensors, pattern, 128)


@pytest.mark.parametrize("places", [(40, 7), (7, 7), (7, 130)])
def test_places_that_no_writer_names_are_refused(places: tuple[int, int]) -> None:
    """In another order they would give the same mask, but other values; 130 was taken for 128."""
    pattern, inputs = patterns.parse("2:129"), 129
    tensors = to_file(pack(pruned(pattern, 1, inputs, torch.float32), pattern))
    right = tensors | {"index": codes.to_bytes(torch.tensor([7, 40]), 8)}
    assert from_file(right, pattern, inputs).dense().nonzero()[:, 1].tolist() == [7, 40]
    with pytest.raises(ValueError, match="places that are not 2 of 129 in ascending order"):
        from_file(right | {"index": codes.to_bytes(torch.tensor(places), 8)}, pattern, inputs)


@pytest.mark.parametrize("name", ["values", "salient_values"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_values_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    pattern = patterns.parse("2:4", "4:16")
    tensors = to_file(pack(pruned(pattern, 2, 32, torch.bfloat16), pattern))
    tensors[name][1, 1] = value
    with pytest.raises(ValueError, match=f"a number of its {name} is NaN or Inf"):
        from_file(tensors, pattern, 32)


def test_columns_get_back_their_own_order() -> None:
    pattern = NM(2, 4)
    order_I = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    stored_OI = pruned(pattern, 300, 64, torch.float32)
    restored = pack(stored_OI, pattern).restored(order_I).dense()
    assert torch.equal(restored[:, order_I], stored_OI)


@pytest.mark.parametrize("order", [[0] * 8, [0, 1, 2, 3, 4, 5, 6, 99], [-1, 0, 1, 2, 3, 4, 5, 6], list(range(7))])
def test_an_order_that_is_none_is_damage(order: list[int]) -> None:
    packed = pack(pruned(NM(2, 4), 2, 8, torch.float32), NM(2, 4))
    with pytest.raises(ValueError, match=r"order of its 8 channels does not name each of them once: .* is damaged"):
        packed.restored(torch.tensor(order))


def test_the_places_of_outliers_are_copied_to_a_device_once() -> None:
    """`meta` stands for a GPU, on which a copy would wait and end the capture of a CUDA graph."""
    pattern, device = NM(2, 8), torch.device("meta")
    assert starts(pattern, 20).tolist() == [0, 0, 8, 8, 16]
    there = starts(pattern, 20, device)
    assert there.device == device and starts(pattern, 20, device) is there
