"""Orders restricted to what folds: within their sets, alike for all runs of a set, and as good as the search finds."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.patterns import NM, parse
from esparse.records.report import run_id
from esparse.shuffles import Shuffle
from esparse.shuffles.gns import Gns
from esparse.shuffles.lbs import Esparse
from esparse.shuffles.lsa import Alternating, Lsa, kept_score

BEST = Alternating(deal="serpentine", block=256, rounds=10, objective="score", foldable=True)


def runs(sets: int, together: int, width: int) -> torch.Tensor:
    return torch.arange(sets * together * width).view(sets, together, width)


@given(sets=st.integers(1, 3), together=st.integers(1, 3), groups=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_the_order_stays_within_its_sets_and_is_alike_for_all_runs(
    sets: int, together: int, groups: int, seed: int
) -> None:
    runs_BRD = runs(sets, together, 4 * groups)
    scores_OI = torch.rand(5, runs_BRD.numel(), generator=torch.Generator().manual_seed(seed))
    order_I = BEST.folded_order(scores_OI, NM(2, 4), runs_BRD)
    for runs_RD in runs_BRD:
        within_RD = order_I[runs_RD] - runs_RD[:, :1]
        assert (within_RD == within_RD[0]).all()
        assert torch.equal(within_RD[0].sort().values, torch.arange(runs_RD.shape[1]))
    own = kept_score(scores_OI, torch.arange(len(order_I)), NM(2, 4))
    assert kept_score(scores_OI, order_I, NM(2, 4)) >= own * (1 - 1e-6)


def test_the_best_order_of_two_heads_that_share_one_is_found() -> None:
    """Against all orders of four channels, in groups of two, for two heads at once."""
    runs_BRD = runs(1, 2, 4)
    for seed in range(8):
        scores_OI = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))
        alike = [torch.tensor([*p, *(4 + i for i in p)]) for p in permutations(range(4))]
        best = max(kept_score(scores_OI, order_I, NM(1, 2)) for order_I in alike)
        found = BEST.folded_order(scores_OI, NM(1, 2), runs_BRD)
        assert kept_score(scores_OI, found, NM(1, 2)) == pytest.approx(best)


def test_groups_do_not_reach_from_one_head_into_the_next() -> None:
    scores_OI = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    own = torch.arange(12)
    assert torch.equal(BEST.folded_order(scores_OI, NM(2, 4), runs(2, 1, 6)), own)  # 4 does not divide 6
    assert not torch.equal(BEST.folded_order(scores_OI, NM(2, 4), runs(1, 1, 12)), own)


@pytest.mark.parametrize(
    "shuffle",
    [
        Esparse(deal="straight", block=256, objective="error", foldable=True),
        Lsa(deal="straight", rounds=1, block=256, objective="error", foldable=True),
    ],
)
def test_the_error_of_layers_is_not_foreseen(shuffle: Shuffle) -> None:
    with pytest.raises(ValueError, match="foldable=true gives several heads one order"):
        shuffle.check(parse("2:4", None))
    dataclasses.replace(shuffle, objective="score").check(parse("2:4", None))


def test_a_run_without_it_is_the_run_it_was() -> None:
    """Ids of runs from before the setting stay valid."""
    config = {"pattern": "2:4", "shuffle": {"_class": "Gns", "deal": "straight"}}
    free = {"pattern": "2:4", "shuffle": {"_class": "Gns", "deal": "straight", "foldable": False}}
    folded = {"pattern": "2:4", "shuffle": {"_class": "Gns", "deal": "straight", "foldable": True}}
    assert run_id(config) == run_id(free) != run_id(folded)
    assert not Gns(deal="straight").foldable
