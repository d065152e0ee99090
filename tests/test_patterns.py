"""Patterns against the slow, obvious version, and their parser."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.patterns import NM, Unstructured, parse


def heaviest(scores: torch.Tensor, pattern: NM) -> torch.Tensor:
    """Oracle: tries all choices of n in each group of m in lexicographic order and takes the first heaviest."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    rows, width = scores.shape
    for row in range(rows):
        for start in range(0, width, pattern.m):
            group = list(range(start, min(start + pattern.m, width)))
            survivors = pattern.n if len(group) == pattern.m else -(-len(group) * pattern.n // pattern.m)
            best = max(combinations(group, survivors), key=lambda choice: scores[row, list(choice)].sum())
            keep[row, list(best)] = True
    return keep


n_of_m = st.integers(2, 8).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@given(n_m=n_of_m, width=st.integers(8, 33), seed=st.integers(0, 2**16), ties=st.booleans())
def test_keep_top_is_the_heaviest_choice(n_m: tuple[int, int], width: int, seed: int, ties: bool) -> None:
    pattern = NM(*n_m)
    scores = torch.rand(3, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties:  # quarters add up exactly, so the first heaviest choice is the one with the lowest indices
        scores = (scores * 4).floor() / 4
    keep = pattern.keep_top(scores)
    assert torch.equal(keep, heaviest(scores, pattern))
    assert pattern.holds(keep)


@pytest.mark.parametrize("m", [4, 16, 32, 256])
def test_of_equal_scores_the_lowest_index_survives(m: int) -> None:
    keep = NM(m // 2, m).keep_top(torch.ones(2, 2 * m))
    assert keep.unflatten(-1, (2, m))[..., : m // 2].all()
    assert keep.sum() == 2 * m


def test_by_hand() -> None:
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0, 0.0, 5.0, 5.0, 5.0, 7.0, 8.0]])
    # Two groups of four, and a tail of two, of which ceil(2 * 2 / 4) = 1 survives.
    assert NM(2, 4).keep_top(scores).int().tolist() == [[0, 1, 0, 1, 0, 1, 1, 0, 0, 1]]
    assert NM(1, 4).keep_top(scores).int().tolist() == [[0, 1, 0, 0, 0, 1, 0, 0, 0, 1]]
    assert NM(3, 4).keep_top(scores).int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1, 1, 1]]
    assert Unstructured(50).keep_top(scores).int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]


def test_n_is_what_survives() -> None:
    assert parse("1:4").keep_top(torch.rand(8, 16)).float().mean() == 0.25


@given(percent=st.floats(1, 99), width=st.integers(1, 60))
def test_unstructured_removes_its_share_of_each_row(percent: float, width: int) -> None:
    keep = Unstructured(percent).keep_top(torch.rand(4, width))
    assert (keep.sum(-1) == width - int(width * percent / 100 + 1e-9)).all()
    assert Unstructured(percent).holds(keep)


def test_holds_notices_one_weight_too_many() -> None:
    keep = NM(2, 4).keep_top(torch.rand(4, 16))
    group = keep[1, 4:8]
    group[int((~group).nonzero()[0])] = True
    assert not NM(2, 4).holds(keep)
    too_full_tail = torch.tensor([[True, True, False, False, True, True]])
    assert not NM(2, 4).holds(too_full_tail)


def test_a_fewer_weight_than_allowed_still_holds() -> None:
    assert NM(2, 4).holds(torch.zeros(3, 9, dtype=torch.bool))


@pytest.mark.parametrize(("text", "pattern"), [("2:4", NM(2, 4)), ("16:32", NM(16, 32)), ("62.5%", Unstructured(62.5))])
def test_parse(text: str, pattern: object) -> None:
    assert parse(text) == pattern
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("124", "unquoted 2:4 is the number 124"),
        (124, "unquoted 2:4 is the number 124"),
        ("4:4", "0 < n < m"),
        ("5:4", "0 < n < m"),
        ("0:4", "0 < n < m"),
        ("100%", "between 0% and 100%"),
        ("2of4", "pattern must look like '2:4'"),
        ("2:4:8", "pattern must look like '2:4'"),
    ],
)
def test_an_unreadable_pattern_says_what_was_expected(text: object, part: str) -> None:
    with pytest.raises(ValueError, match="pattern") as error:
        parse(text)
    assert part in str(error.value)
    assert repr(text) in str(error.value)
