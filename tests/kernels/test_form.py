"""The compute form against loops over single weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.kernels.form import kept_per_row, to_dense, to_form, units, unpacked_bits
from esparse.patterns import NM

patterns = st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def test_by_hand() -> None:
    weight_RI = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, -0.0], [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    keep_RI = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0, 0, 1, 1, 0]]).bool()
    values_RK, bits_RB = to_form(weight_RI, keep_RI)
    assert values_RK.tolist() == [[1, 4, 6, 7, 0], [2, 3, 5, 8, 9]]
    assert not torch.signbit(values_RK).any()
    assert bits_RB.tolist() == [[0b01101001, 0b10], [0b10010110, 0b01]]


@given(pattern=patterns, rows=st.integers(1, 4), inputs=st.integers(1, 80), seed=st.integers(0, 99))
def test_there_and_back(pattern: tuple[int, int], rows: int, inputs: int, seed: int) -> None:
    seeded = torch.Generator().manual_seed(seed)
    weight_RI = torch.randn(rows, inputs, generator=seeded)
    keep_RI = NM(*pattern).keep_top(torch.rand(rows, inputs, generator=seeded))
    values_RK, bits_RB = to_form(weight_RI, keep_RI)
    assert values_RK.shape == (rows, kept_per_row(inputs, *pattern))
    assert torch.equal(unpacked_bits(bits_RB, inputs), keep_RI)
    for row in range(rows):
        kept = [float(weight_RI[row, i]) for i in range(inputs) if keep_RI[row, i]]
        assert values_RK[row].tolist() == kept
    assert torch.equal(to_dense(values_RK, bits_RB, inputs), weight_RI * keep_RI)


@given(pattern=patterns)
def test_runs_hold_whole_groups(pattern: tuple[int, int]) -> None:
    n, m = pattern
    cut = units(n, m)
    if cut is None:
        assert n > 16
        return
    assert cut.columns % m == 0 and cut.columns <= 32
    assert cut.kept == cut.columns // m * n <= 16


def test_every_half_pattern_has_runs() -> None:
    for m in range(2, 33, 2):
        assert units(m // 2, m) is not None
    for m in (2, 4, 8, 16):  # one 16-byte load of half-precision values
        cut = units(m // 2, m)
        assert cut is not None and (cut.columns, cut.kept) == (16, 8)


def test_rows_that_keep_different_numbers_are_refused() -> None:
    keep_RI = torch.tensor([[True, False], [True, True]])
    with pytest.raises(ValueError, match="got 1 to 2"):
        to_form(torch.ones(2, 2), keep_RI)
