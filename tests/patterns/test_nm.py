"""n:m, and n:m beside outliers, against the slow, obvious version."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.patterns import NM, Outliers, parse

CPU = torch.device("cpu")


def scores(rows: int, width: int, seed: int, ties: bool) -> torch.Tensor:
    x = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Quarters add up exactly, so the first heaviest choice is the one with the lowest indices.
    return (x * 4).floor() / 4 if ties else x


def groups(width: int, pattern: NM) -> list[tuple[list[int], int]]:
    """The inputs of each group, and how many of them survive."""
    cut = [list(range(start, min(start + pattern.m, width))) for start in range(0, width, pattern.m)]
    return [(group, -(-len(group) * pattern.n // pattern.m)) for group in cut]


def heaviest(scores: torch.Tensor, pattern: NM) -> torch.Tensor:
    """Oracle: tries all choices of n in each group of m in lexicographic order and takes the first heaviest."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(len(scores)):
        for group, count in groups(scores.shape[1], pattern):
            best = max(combinations(group, count), key=lambda choice: scores[row, list(choice)].sum())
            keep[row, list(best)] = True
    return keep


def places_first(scores: torch.Tensor, pattern: Outliers) -> torch.Tensor:
    """Oracle: a list of each group's best, then a list of the best others of each run."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        kept: set[int] = set()
        for group, count in groups(len(values), pattern.base):
            kept |= set(sorted(group, key=lambda i: (-values[i], i))[:count])
        for run, count in groups(len(values), pattern.outliers):
            others = [i for i in run if i not in kept]
            kept |= set(sorted(others, key=lambda i: (-values[i], i))[:count])
        keep[row, sorted(kept)] = True
    return keep


n_of_m = st.integers(2, 8).flatmap(lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m)))
outliers = st.tuples(n_of_m, st.integers(1, 4)).flatmap(
    lambda drawn: st.builds(
        Outliers,
        st.just(drawn[0]),
        st.builds(NM, st.integers(1, drawn[0].m * drawn[1] - 1), st.just(drawn[0].m * drawn[1])),
    )
)


@given(pattern=n_of_m, width=st.integers(8, 33), seed=st.integers(0, 2**16), ties=st.booleans())
def test_keep_top_is_the_heaviest_choice(pattern: NM, width: int, seed: int, ties: bool) -> None:
    x = scores(3, width, seed, ties)
    keep = pattern.keep_top(x)
    assert torch.equal(keep, heaviest(x, pattern))
    assert pattern.holds(keep)


@pytest.mark.parametrize("m", [4, 16, 32, 256])
def test_of_equal_scores_the_lowest_index_survives(m: int) -> None:
    keep = NM(m // 2, m).keep_top(torch.ones(2, 2 * m))
    assert keep.unflatten(-1, (2, m))[..., : m // 2].all()
    assert keep.sum() == 2 * m


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 4.0, 2.0, 3.0, 0.0, 5.0, 5.0, 5.0, 7.0, 8.0]])
    # Two groups of four, and a tail of two, of which ceil(2 * 2 / 4) = 1 survives.
    assert NM(2, 4).keep_top(x).int().tolist() == [[0, 1, 0, 1, 0, 1, 1, 0, 0, 1]]
    assert NM(1, 4).keep_top(x).int().tolist() == [[0, 1, 0, 0, 0, 1, 0, 0, 0, 1]]
    assert NM(3, 4).keep_top(x).int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1, 1, 1]]


def test_outliers_by_hand() -> None:
    x = torch.tensor([[9.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 7.0, 6.0]])
    # 1:2 beside 2:8. The pairs keep 9, 2, 4 and the first 5; of the others 8 and the second 5 are the best. Of the
    # tail of two the base keeps 7, and ceil(2 * 2 / 8) = 1 other is recovered.
    assert Outliers(NM(1, 2), NM(2, 8)).keep_top(x).int().tolist() == [[1, 1, 0, 1, 0, 1, 1, 1, 1, 1]]
    # 2:4 beside 1:8: 9, 8 and both 5 have places, and of the others 4 is the best.
    assert Outliers(NM(2, 4), NM(1, 8)).keep_top(x).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 1, 1, 1]]


def test_n_is_what_survives() -> None:
    assert parse("1:4").keep_top(torch.rand(8, 16)).float().mean() == 0.25
    assert parse("8:16", "16:256").keep_top(torch.rand(4, 512)).float().mean() == 8 / 16 + 16 / 256


@given(pattern=outliers, width=st.integers(1, 40), seed=st.integers(0, 2**16), ties=st.booleans())
def test_the_base_places_its_best_and_the_best_others_are_recovered(
    pattern: Outliers, width: int, seed: int, ties: bool
) -> None:
    x = scores(3, width, seed, ties)
    keep = pattern.keep_top(x)
    assert torch.equal(keep, places_first(x, pattern))
    assert pattern.holds(keep)
    assert (keep >= pattern.base.keep_top(x)).all()
    base, outliers = pattern.base, pattern.outliers
    if width % outliers.m == 0:
        share = min(1.0, base.n / base.m + outliers.n / outliers.m)
        assert keep.float().mean() == pytest.approx(share)


SMALL = [
    Outliers(NM(1, 2), NM(1, 4)),
    Outliers(NM(1, 2), NM(2, 8)),
    Outliers(NM(1, 2), NM(5, 6)),
    Outliers(NM(1, 3), NM(1, 6)),
    Outliers(NM(2, 4), NM(1, 8)),
    Outliers(NM(3, 4), NM(1, 4)),
]


@pytest.mark.parametrize("width", [1, 5, 7, 8, 9])
@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_holds_exactly_where_some_choice_of_outliers_explains_the_mask(pattern: Outliers, width: int) -> None:
    """Oracle: the masks of the base and of the outliers, each listed whole; every union of two holds, no other does."""

    def all_masks(of: NM) -> list[int]:
        allowed = [(sum(1 << i for i in group), count) for group, count in groups(width, of)]
        return [x for x in range(2**width) if all((x & group).bit_count() <= most for group, most in allowed)]

    expected = {one | other for one, other in product(all_masks(pattern.base), all_masks(pattern.outliers))}
    masks = (torch.arange(2**width)[:, None] >> torch.arange(width)) % 2 == 1
    got = {x for x in range(2**width) if pattern.holds(masks[x : x + 1])}
    assert got == expected
    assert pattern.holds(masks[sorted(expected)])


@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_no_mask_that_holds_keeps_more(pattern: Outliers) -> None:
    x = scores(1, 9, 3, ties=False)
    masks = (torch.arange(2**9)[:, None] >> torch.arange(9)) % 2 == 1
    most = max(float(x[mask[None]].sum()) for mask in masks if pattern.holds(mask[None]))
    assert float(x[pattern.keep_top(x)].sum()) == pytest.approx(most)


def test_holds_notices_one_weight_too_many() -> None:
    keep = NM(2, 4).keep_top(torch.rand(4, 16))
    group = keep[1, 4:8]
    group[int((~group).nonzero()[0])] = True
    assert not NM(2, 4).holds(keep)
    too_full_tail = torch.tensor([[True, True, False, False, True, True]])
    assert not NM(2, 4).holds(too_full_tail)


def test_a_fewer_weight_than_allowed_still_holds() -> None:
    assert NM(2, 4).holds(torch.zeros(3, 9, dtype=torch.bool))
    assert Outliers(NM(2, 4), NM(1, 8)).holds(torch.zeros(3, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    ("text", "bits"),
    [("2:4", 3), ("4:8", 7), ("8:16", 14), ("16:32", 30), ("4:256", 28), ("8:256", 49), ("16:256", 84), ("6:8", 5)],
)
def test_metadata_is_what_the_papers_count(text: str, bits: int) -> None:
    """0.75 bits per element at 2:4 and 0.875 at 8:16 stand in arXiv 2507.03052; the others follow the same count."""
    pattern = parse(text)
    assert isinstance(pattern, NM)
    assert pattern.metadata_bits(1, pattern.m) == bits
    assert pattern.metadata_bits(3, 4 * pattern.m) == 12 * bits


def test_metadata_of_tails_and_of_outliers() -> None:
    assert NM(2, 4).metadata_bits(5, 11) == 5 * (3 + 3 + 2)  # a tail of 3, of which 2 survive: one of 3 choices
    assert NM(1, 2).metadata_bits(5, 3) == 5 * 1  # a tail of one survives: no choice
    assert Outliers(NM(8, 16), NM(16, 256)).metadata_bits(3, 512) == 3 * 2 * (16 * 14 + 84)


def test_a_shuffle_forms_the_groups_of_the_base() -> None:
    assert NM(2, 4).shuffled_groups(19) == NM(2, 4)
    assert NM(2, 4).shuffled_groups(3) is None
    pattern = Outliers(NM(2, 4), NM(3, 8))
    assert pattern.shuffled_groups(19) == NM(2, 4)
    assert pattern.shuffled_groups(3) is None
