"""The local block shuffle and the whole shuffle of E-Sparse: what any order must hold, by hand, and by trying all."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.patterns import NM, Unstructured
from esparse.shuffles.gns import Gns
from esparse.shuffles.lbs import Esparse, Lbs


def kept(scores: torch.Tensor, order: torch.Tensor, pattern: NM) -> float:
    ordered = scores[:, order].double()
    return (ordered * pattern.keep_top(ordered)).sum().item()


n_of_m = st.integers(2, 8).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@given(n_m=n_of_m, width=st.integers(8, 50), block=st.integers(16, 30), seed=st.integers(0, 2**16), ties=st.booleans())
def test_an_order_is_canonical_and_keeps_at_least_as_much(
    n_m: tuple[int, int], width: int, block: int, seed: int, ties: bool
) -> None:
    pattern = NM(*n_m)
    scores = torch.rand(5, width, generator=torch.Generator().manual_seed(seed))
    scores = (scores * 3).floor() if ties else scores
    own = torch.arange(width)
    whole = width - width % pattern.m
    for deal in ("straight", "serpentine"):
        dealt = Gns(deal=deal).order(scores, pattern)
        lbs, both = Lbs(objective="score", block=block), Esparse(objective="score", deal=deal, block=block)
        for start, shuffle in ((own, lbs), (dealt, both)):
            order = shuffle.order(scores, pattern)
            assert order is not None and start is not None and order.dtype == torch.int64
            assert kept(scores, order, pattern) >= kept(scores, start, pattern)
            assert order[whole:].tolist() == own[whole:].tolist()
            assert (order[:whole].view(-1, pattern.m).diff(dim=1) > 0).all()
            cuts = range(0, whole, block - block % pattern.m)
            for begin, end in zip(cuts, [*cuts[1:], whole], strict=True):
                assert sorted(order[begin:end].tolist()) == sorted(start[begin:end].tolist())


def test_by_hand() -> None:
    # The own order keeps 9 + 8 and 1 + 1. The swaps of 9, 7 or 6 with a 1 gain equally: the first is made, and then
    # 8 goes to 9. Both groups now keep two large scores, which no grouping can surpass.
    scores = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1]])
    order = Lbs(objective="score", block=8).order(scores, NM(2, 4))
    assert order is not None
    assert order.tolist() == [2, 3, 4, 5, 0, 1, 6, 7]
    assert kept(scores, order, NM(2, 4)) == 30


@given(seed=st.integers(0, 2**16), n=st.integers(1, 3), rows=st.integers(1, 6))
def test_never_above_the_best_of_all_groupings(seed: int, n: int, rows: int) -> None:
    """Greedy ends in a local optimum: between the own order and the best of the 35 ways to split 8 in 4 and 4."""
    pattern = NM(n, 4)
    scores = torch.rand(rows, 8, generator=torch.Generator().manual_seed(seed))
    splits = [[0, *rest] for rest in combinations(range(1, 8), 3)]
    orders = [torch.tensor(first + [channel for channel in range(8) if channel not in first]) for first in splits]
    best = max(kept(scores, order, pattern) for order in orders)
    order = Lbs(objective="score", block=8).order(scores, pattern)
    assert order is not None
    assert kept(scores, torch.arange(8), pattern) <= kept(scores, order, pattern) <= best * (1 + 1e-12)
    if rows == 1:  # in a single row a channel out of place always has one to change places with
        assert kept(scores, order, pattern) == pytest.approx(best, rel=1e-6)


def test_equal_scores_stay_where_they_are() -> None:
    assert torch.equal(_order(torch.ones(3, 18)), torch.arange(18))
    assert torch.equal(_order(torch.zeros(3, 18)), torch.arange(18))


def test_half_precision_and_inference_mode() -> None:
    scores = torch.rand(9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        order = _order(scores)
        assert torch.equal(order, _order(scores.float()))
        assert Esparse(objective="score", deal="serpentine", block=16).order(scores, NM(2, 4)) is not None
    assert not torch.equal(order, torch.arange(32))
    assert torch.equal(order, _order(scores.clone().requires_grad_()))


def test_a_layer_narrower_than_the_block_is_one_block() -> None:
    scores = torch.rand(9, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_order(scores, block=256), _order(scores, block=32))
    assert torch.equal(_order(scores[:, :7], block=256), torch.arange(7))  # a single group and a tail


def test_without_groups_there_is_nothing_to_order() -> None:
    for shuffle in (Lbs(objective="score", block=8), Esparse(objective="score", deal="straight", block=8)):
        assert shuffle.order(torch.rand(2, 16), Unstructured(50)) is None
        assert shuffle.order(torch.rand(2, 3), NM(2, 4)) is None


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"block of 7 channels.*use at least 8"):
        _order(torch.rand(2, 16), block=7)
    with pytest.raises(ValueError, match=r"straight.*serpentine.*snake"):
        Esparse(objective="score", deal="snake", block=8)


def _order(scores: torch.Tensor, block: int = 16) -> torch.Tensor:
    order = Lbs(objective="score", block=block).order(scores, NM(2, 4))
    assert order is not None
    return order
