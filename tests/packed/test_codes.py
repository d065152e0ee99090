"""Choices as numbers, against itertools.combinations; numbers as bits, against Python's integers."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.packed import codes


def in_order(n: int, m: int) -> list[int]:
    """Oracle: the words of all choices, in the order of itertools.combinations."""
    return [sum(1 << place for place in chosen) for chosen in combinations(range(m), n)]


@pytest.mark.parametrize(
    ("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (3, 5), (2, 7), (8, 16), (1, 16), (2, 20)]
)
def test_numbers_are_places_among_the_combinations(n: int, m: int) -> None:
    words_N = torch.tensor(in_order(n, m))
    assert codes.numbers(words_N, n, m).tolist() == list(range(math.comb(m, n)))
    assert codes.choices(torch.arange(math.comb(m, n)), n, m).tolist() == words_N.tolist()


def test_long_groups_are_numbered_without_a_table() -> None:
    n, m = 16, 32
    first, last = sum(1 << i for i in range(16)), sum(1 << i for i in range(16, 32))
    assert codes.numbers(torch.tensor([first, last]), n, m).tolist() == [0, math.comb(32, 16) - 1]
    numbers_N = torch.randint(math.comb(m, n), (200,), generator=torch.Generator().manual_seed(0))
    words_N = codes.choices(numbers_N, n, m)
    assert all(int(word).bit_count() == n for word in words_N)
    assert torch.equal(codes.numbers(words_N, n, m), numbers_N)


def test_by_hand() -> None:
    # 2:4: {0,1} {0,2} {0,3} {1,2} {1,3} {2,3} are 0 to 5
    keep_NM = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.bool)
    numbers_N = codes.numbers(codes.words(keep_NM), 2, 4)
    assert numbers_N.tolist() == [0, 5, 4]
    assert codes.to_bytes(numbers_N, 3).tolist() == [0b00101000, 0b1]  # 100 101 000 from the right
    assert torch.equal(codes.unworded(codes.words(keep_NM), 4), keep_NM)


def test_bits_of_the_patterns() -> None:
    assert [codes.code_bits(*nm) for nm in ((2, 4), (4, 8), (8, 16), (16, 32), (1, 1))] == [3, 7, 14, 30, 0]


@given(bits=st.integers(0, 32), count=st.integers(0, 40), seed=st.integers(0, 2**16))
def test_a_stream_of_bits_is_the_integer_they_make(bits: int, count: int, seed: int) -> None:
    numbers_N = torch.randint(1 << bits, (count,), generator=torch.Generator().manual_seed(seed))
    whole = sum(number << (bits * i) for i, number in enumerate(numbers_N.tolist()))
    expected = list(whole.to_bytes(-(-bits * count // 8), "little"))
    bytes_B = codes.to_bytes(numbers_N, bits)
    assert bytes_B.tolist() == expected
    assert torch.equal(codes.from_bytes(bytes_B, count, bits), numbers_N)


def test_numbers_stay_on_their_device() -> None:
    there = torch.device("meta")  # any but the CPU: on a GPU, codes are read where the layer is
    assert codes.from_bytes(torch.empty(9, dtype=torch.uint8, device=there), 20, 3).device == there
    assert codes.to_bytes(torch.empty(20, dtype=torch.int64, device=there), 3).device == there
