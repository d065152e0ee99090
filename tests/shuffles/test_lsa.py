"""Slot-wise assignment against brute force, and what the searches built on it promise."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.patterns import NM, Unstructured
from esparse.shuffles.gns import Gns
from esparse.shuffles.lbs import Esparse, Lbs
from esparse.shuffles.lsa import Alternating, Lsa, kept_score
from esparse.shuffles.score_swaps import summed_maxima
from esparse.shuffles.slot_assignment import assign_slots

pytestmark = pytest.mark.usefixtures("loops")


def scores(rows: int, inputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, inputs, generator=generator) * torch.rand(inputs, generator=generator) * 4


@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4), NM(1, 4), NM(3, 4)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_one_slot_is_assigned_as_brute_force_would(pattern: NM, seed: int) -> None:
    """Oracle: for slot after slot, all ways to hand the groups' channels round, each recomputed from the scores."""
    m, groups = pattern.m, 4
    x = scores(5, m * groups, seed)
    channels = torch.arange(m * groups).view(groups, m)
    for slot in range(m):
        best, best_kept = channels, kept_score(x, channels.flatten(), pattern)
        for hand in permutations(range(groups)):
            trial = channels.clone()
            trial[:, slot] = channels[list(hand), slot]
            if (kept := kept_score(x, trial.flatten(), pattern)) > best_kept * (1 + 1e-9):
                best, best_kept = trial, kept
        channels = best
    got = assign_slots(x, torch.arange(m * groups), n=pattern.n, m=m)
    assert kept_score(x, got, pattern) == pytest.approx(kept_score(x, channels.flatten(), pattern))


@given(seed=st.integers(0, 2**16), tail=st.integers(0, 3), n=st.integers(1, 3))
def test_searches_never_keep_less_and_return_an_order(seed: int, tail: int, n: int) -> None:
    pattern = NM(n, 4)
    x = scores(6, 24 + tail, seed)
    own = torch.arange(24 + tail)
    dealt = Gns(deal="serpentine").order(x, pattern)
    assert dealt is not None
    lsa = Lsa(objective="score", block=256, deal="serpentine", rounds=3).order(x, pattern)
    best = Alternating(objective="score", deal="serpentine", block=256, rounds=5).order(x, pattern)
    for order in (lsa, best):
        assert order is not None
        assert order.sort().values.tolist() == own.tolist()
        assert order[24:].tolist() == own[24:].tolist()
        assert (order[:24].view(-1, 4).diff(dim=1) > 0).all()
    kept = {name: kept_score(x, order, pattern) for name, order in {"own": own, "dealt": dealt, "lsa": lsa}.items()}
    assert kept["lsa"] >= kept["dealt"] * (1 - 1e-7)
    others = [Lbs(objective="score", block=256), Esparse(objective="score", deal="serpentine", block=256)]
    for order in (shuffle.order(x, pattern) for shuffle in others):
        assert kept_score(x, best, pattern) >= kept_score(x, order, pattern) * (1 - 1e-5)


def test_equal_scores_leave_the_channels_where_they_are() -> None:
    x = torch.ones(3, 12)
    assert assign_slots(x, torch.arange(12), n=2, m=4).tolist() == list(range(12))
    assert Alternating(objective="score", deal="straight", block=256, rounds=3).order(x, NM(2, 4)).tolist() == list(
        range(12)
    )


def test_by_hand() -> None:
    """1:2, two groups (0 1) and (2 3): the large channels 0 and 1 stand together and must part."""
    x = torch.tensor([[9.0, 8.0, 1.0, 2.0]])
    assert kept_score(x, torch.arange(4), NM(1, 2)) == 11
    assert kept_score(x, assign_slots(x, torch.arange(4), n=1, m=2), NM(1, 2)) == 17


@pytest.mark.parametrize("rows", [7, 300])  # less and more than a tile, or a stripe of the compiled loop
def test_summed_maxima(rows: int) -> None:
    """Each channel p of 5 groups of 2 takes one of its group's 3 thresholds."""
    thresholds = scores(15, rows, 1).view(5, 3, rows)
    takes = torch.randint(3, (5, 2, rows), generator=torch.Generator().manual_seed(3))
    which = torch.nn.functional.one_hot(takes, 3).movedim(-1, 2).float()
    channels = scores(rows, 4, 2)
    got = summed_maxima(thresholds, which, channels)
    for k in range(5):
        for p in range(2):
            for q in range(4):
                pairs = ((float(thresholds[k, takes[k, p, r], r]), float(channels[r, q])) for r in range(rows))
                assert float(got[k, p, q]) == pytest.approx(sum(max(pair) for pair in pairs), rel=1e-6)


def test_patterns_without_groups_have_no_order() -> None:
    for kind in (Lsa, Alternating):
        shuffle = kind(objective="score", deal="straight", block=256, rounds=1)
        assert shuffle.order(scores(2, 8, 0), Unstructured(50)) is None


@pytest.mark.parametrize("kind", [Lsa, Alternating])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"deal": "odd"}, "deal.*odd"), ({"rounds": 0}, "rounds.*0"), ({"objective": "ppl"}, "score, error.*ppl")],
)
def test_settings_that_make_no_sense_are_refused(kind: type[Lsa | Alternating], wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kind(**({"objective": "score", "deal": "straight", "block": 256, "rounds": 1} | wrong))


def test_blocks_too_narrow_for_the_pattern_are_refused_where_there_are_any() -> None:
    settings = {"deal": "straight", "block": 7, "rounds": 1}
    for shuffle in (Lsa(objective="error", **settings), Alternating(objective="score", **settings)):
        with pytest.raises(ValueError, match=r"shuffle.block=7.*at least 8"):
            shuffle.check(NM(2, 4))
    Lsa(objective="score", **settings).check(NM(2, 4))
