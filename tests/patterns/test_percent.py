"""Patterns in per cent against lists and loops."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.patterns import Columns, Pattern, Rows, Tiles, Unstructured

percents = st.sampled_from([0.5, 10.0, 25.0, 33.3, 50.0, 62.5, 90.0, 99.9])
sizes = st.integers(1, 24)
seeds = st.integers(0, 2**16)


def matrix(outputs: int, inputs: int, seed: int, ties: bool) -> torch.Tensor:
    x = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return (x * 2).floor() if ties else x


def left(count: int, percent: float) -> int:
    return count - int(count * Fraction(str(percent)) / 100)


def best(values: list[Fraction], percent: float) -> list[int]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return order[: left(len(values), percent)]


def mean(values: list[float]) -> Fraction:
    return sum(map(Fraction, values)) / len(values)


@given(percent=st.floats(1, 99), width=st.integers(1, 60))
def test_unstructured_removes_its_share_of_each_row(percent: float, width: int) -> None:
    keep = Unstructured(percent).keep_top(torch.rand(4, width))
    assert (keep.sum(-1) == width - int(width * percent / 100 + 1e-9)).all()
    assert Unstructured(percent).holds(keep)


def test_a_product_that_is_whole_is_not_rounded_below_itself() -> None:
    """18.4% of 375 are 69; in floating point 375 * 18.4 / 100 is a little less."""
    x = torch.rand(2, 375)
    for pattern in (Unstructured(18.4), Columns(18.4), Tiles(18.4, 2, 1)):
        assert int((~pattern.keep_top(x)).sum()) == 2 * 69
    assert int((~Rows(18.4).keep_top(x.T)).sum()) == 2 * 69


@given(percent=percents, outputs=sizes, inputs=sizes, seed=seeds, ties=st.booleans())
def test_columns_and_rows_with_the_best_means_survive(
    percent: float, outputs: int, inputs: int, seed: int, ties: bool
) -> None:
    x = matrix(outputs, inputs, seed, ties)
    columns, rows = torch.zeros(2, outputs, inputs, dtype=torch.bool)
    columns[:, best([mean(column) for column in x.T.tolist()], percent)] = True
    rows[best([mean(row) for row in x.tolist()], percent)] = True
    for pattern, expected in ((Columns(percent), columns), (Rows(percent), rows)):
        keep = pattern.keep_top(x)
        assert torch.equal(keep, expected)
        assert pattern.holds(keep)
        assert torch.equal(pattern.keep_top(x.bfloat16()), pattern.keep_top(x.bfloat16().float()))


@given(
    percent=percents,
    outputs=sizes,
    inputs=sizes,
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=seeds,
    ties=st.booleans(),
)
def test_blocks_with_the_best_means_of_their_strip_survive(
    percent: float, outputs: int, inputs: int, height: int, width: int, seed: int, ties: bool
) -> None:
    x, pattern = matrix(outputs, inputs, seed, ties), Tiles(percent, height, width)
    expected = torch.zeros(outputs, inputs, dtype=torch.bool)
    for top in range(0, outputs, height):
        strip, starts = slice(top, top + height), range(0, inputs, width)
        means = [mean(x[strip, start : start + width].flatten().tolist()) for start in starts]
        for block in best(means, percent):
            expected[strip, starts[block] : starts[block] + width] = True
    keep = pattern.keep_top(x)
    assert torch.equal(keep, expected)
    assert pattern.holds(keep)
    assert keep.is_contiguous()


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 4.0, 2.0, 3.0, 0.0], [2.0, 1.0, 2.0, 0.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    # The columns' sums are 4 6 5 4 10: of the equal ones the lower index survives. 40% of 3 rows: one goes.
    assert Columns(40).keep_top(x).int().tolist() == [[0, 1, 1, 0, 1]] * 3
    assert Columns(20).keep_top(x).int().tolist() == [[1, 1, 1, 0, 1]] * 3
    assert Rows(40).keep_top(x).int().tolist() == [[1] * 5, [1] * 5, [0] * 5]
    # Blocks of 2 x 2: the means of the first strip are 2, 1.75, 4.5; those of the lower edge are equal.
    assert Tiles(50, 2, 2).keep_top(x).int().tolist() == [[1, 1, 0, 0, 1]] * 2 + [[1, 1, 1, 1, 0]]
    x = torch.tensor([[1.0, 4.0, 2.0, 3.0, 0.0, 5.0, 5.0, 5.0, 7.0, 8.0]])
    assert Unstructured(50).keep_top(x).int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]


PATTERNS = [Unstructured(50), Columns(50), Rows(50), Tiles(50, 4, 4), Tiles(50, 3, 5)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_holds_notices_one_weight_too_many_and_no_weight_too_few(pattern: Pattern) -> None:
    keep = pattern.keep_top(matrix(10, 14, 0, ties=False))
    for place in (~keep).nonzero().tolist()[::5]:
        more = keep.clone()
        more[tuple(place)] = True
        assert not pattern.holds(more)
    generator = torch.Generator().manual_seed(1)
    for share in (0.0, 0.1, 0.5, 1.0):
        assert pattern.holds(keep & (torch.rand(keep.shape, generator=generator) < share))


def test_metadata_is_one_bit_for_each_thing_that_goes_whole() -> None:
    assert Unstructured(50).metadata_bits(10, 14) == 140
    assert Columns(50).metadata_bits(10, 14) == 14
    assert Rows(50).metadata_bits(10, 14) == 10
    assert Tiles(50, 4, 4).metadata_bits(10, 14) == 3 * 4


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_shuffle_has_nothing_to_form(pattern: Pattern) -> None:
    assert pattern.shuffled_groups(16) is None
    assert pattern.swap_width is None
