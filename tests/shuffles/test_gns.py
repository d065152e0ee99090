"""The global deal, by hand and by its properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.patterns import NM, Unstructured
from esparse.shuffles.gns import Gns


@pytest.mark.parametrize(
    ("deal", "expected"),
    # By falling mean the channels are 5 3 6 0 2 7 1 4: dealt to two groups, the rounds are 53 60 27 14 or 53 06 27 41.
    [("straight", [1, 2, 5, 6, 0, 3, 4, 7, 8]), ("serpentine", [0, 2, 4, 5, 1, 3, 6, 7, 8])],
)
def test_by_hand(deal: str, expected: list[int]) -> None:
    # The means are 5 2 4 7 1 8 6 3 and, in the tail that 2:4 does not divide, 9.
    scores = torch.tensor([[4.0, 2, 8, 7, 0, 16, 6, 3, 9], [6.0, 2, 0, 7, 2, 0, 6, 3, 9]])
    order = Gns(deal=deal).order(scores, NM(2, 4))
    assert order is not None and order.dtype == torch.int64
    assert order.tolist() == expected


@given(seed=st.integers(0, 2**16), m=st.integers(2, 8), width=st.integers(8, 40))
def test_no_two_channels_of_a_round_share_a_group(seed: int, m: int, width: int) -> None:
    scores = torch.rand(3, width, generator=torch.Generator().manual_seed(seed))
    groups = width // m
    by_mean = scores[:, : groups * m].double().mean(0).argsort(descending=True)
    for deal in ("straight", "serpentine"):
        order = Gns(deal=deal).order(scores, NM(1, m))
        assert order is not None
        group_of = torch.empty(groups * m, dtype=torch.int64)
        group_of[order[: groups * m]] = torch.arange(groups).repeat_interleave(m)
        dealt = group_of[by_mean].view(m, groups)  # the group of each card, round by round
        assert (dealt.sort(dim=1).values == torch.arange(groups)).all()
        assert (dealt[0] == torch.arange(groups)).all()
        assert (dealt[1] == dealt[0].flip(0) if deal == "serpentine" else dealt[1] == dealt[0]).all()
        assert order[groups * m :].tolist() == list(range(groups * m, width))
        assert torch.equal(order[: groups * m].view(-1, m), order[: groups * m].view(-1, m).sort(dim=1).values)


def test_equal_channels_are_dealt_in_their_own_order() -> None:
    order = Gns(deal="straight").order(torch.ones(2, 12), NM(2, 4))
    assert order is not None
    assert order.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


def test_without_groups_there_is_nothing_to_order() -> None:
    assert Gns(deal="straight").order(torch.rand(2, 8), Unstructured(50)) is None
    assert Gns(deal="straight").order(torch.rand(2, 3), NM(2, 4)) is None


def test_an_unknown_deal_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"straight.*serpentine.*snake"):
        Gns(deal="snake")
