"""What every pattern promises to those who use it: the sweep of OBS, ADMM, swaps and shuffles."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose
from hypothesis import given
from hypothesis import strategies as st

from esparse.cli import registry
from esparse.patterns import NM, Columns, Grouping, Outliers, Pattern, Rows, Tiles, Unstructured, parse
from esparse.shuffles import Shuffle
from esparse.updates import Solution
from esparse.updates.admm import Admm
from esparse.updates.obs import Obs, sweep
from esparse.updates.swap import Swap
from tests.composing import composing
from tests.updates.test_updates import error, problem

CONF = Path(__file__).parent.parent.parent / "conf"
PATTERNS = [
    NM(2, 4),
    Outliers(NM(2, 4), NM(3, 16)),
    Outliers(NM(1, 4), NM(5, 12)),
    Unstructured(50),
    Columns(40),
    Rows(40),
    Tiles(50, 4, 4),
    Tiles(34, 5, 3),
]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@patterns
@given(width=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_each_cut_can_be_chosen_by_itself(pattern: Pattern, width: int, seed: int) -> None:
    x = torch.rand(9, width, generator=torch.Generator().manual_seed(seed))
    cuts = pattern.cuts(width)
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(width))
    assert torch.equal(torch.cat([pattern.keep_top(x[:, cut]) for cut in cuts], 1), pattern.keep_top(x))


@patterns
@pytest.mark.parametrize("shuffled", [False, True])
def test_obs_and_admm_choose_masks_that_hold(pattern: Pattern, shuffled: bool) -> None:
    layer, start = problem(outputs=10, inputs=38, pattern=pattern, shuffled=shuffled)
    obs = Obs(mask="own", damp=0.01, block=8)
    admm = Admm(mask="own", damp=0.1, penalty=1.0, iterations=20, prune_iterations=15)
    for update in (obs, admm):
        done = update.apply(layer, start)
        assert layer.grouping.holds(done.keep_OI)
        assert layer.grouping.holds(done.weight_OI != 0)
        assert (done.weight_OI[~done.keep_OI] == 0).all()
        assert error(layer, done.weight_OI) < error(layer, torch.zeros_like(done.weight_OI))
        # How many survive depends on how many outliers share a group, or which blocks are smaller.
        if not isinstance(pattern, Outliers | Tiles):
            # Of a share in per cent the weight on the border goes, too, in each block of columns.
            border = len(pattern.sweep_cuts(38, 8)) if update is obs and isinstance(pattern, Unstructured) else 0
            assert int(done.keep_OI.sum()) == int(start.keep_OI.sum()) - border


@pytest.mark.parametrize("pattern", [*PATTERNS, parse("8:16", "16:256")], ids=str)
@pytest.mark.parametrize("block", [7, 128])
def test_where_inputs_do_not_hang_together_obs_chooses_by_the_weights_alone(pattern: Pattern, block: int) -> None:
    dense_OI = torch.randn(6, 600, generator=torch.Generator().manual_seed(0))
    _, keep_OI = sweep(dense_OI, torch.eye(600), pattern, None, block=block)
    cuts = pattern.sweep_cuts(600, block)
    expected = torch.cat([pattern.keep_of_sweep(dense_OI[:, cut].square()) for cut in cuts], 1)
    assert torch.equal(keep_OI, expected)
    if not isinstance(pattern, Unstructured):  # whose share is of each block of columns there
        assert torch.equal(keep_OI, pattern.keep_top(dense_OI.square()))


@patterns
@pytest.mark.parametrize("values", ["dense", "best"])
def test_swaps_keep_the_pattern_or_refuse_it(pattern: Pattern, values: str) -> None:
    layer, start = problem(outputs=10, inputs=38, pattern=pattern, shuffled=True)
    swap = Swap(values=values, damp=1e-6, steps=500)
    if pattern.swap_width is None:
        with pytest.raises(ValueError, match="needs an n:m pattern, not"):
            swap.check(pattern)
        return
    done = swap.apply(layer, start)
    assert layer.grouping.holds(done.keep_OI)
    assert not torch.equal(done.keep_OI, start.keep_OI)
    assert error(layer, done.weight_OI) < error(layer, start.weight_OI)


@patterns
def test_a_grouping_cuts_in_its_order(pattern: Pattern) -> None:
    x, order_I = torch.rand(9, 38), torch.randperm(38)
    grouping = Grouping(pattern, order_I)
    keep = grouping.keep_top(x)
    assert torch.equal(keep[:, order_I], pattern.keep_top(x[:, order_I]))
    assert grouping.holds(keep)
    assert grouping.holds(Solution.without_update(x, keep).weight_OI != 0)


@cache
def shuffle(*overrides: str) -> Shuffle:
    """With the numbers of its YAML file."""
    with composing():
        return registry.build(compose("config", list(overrides))).shuffle


@pytest.mark.parametrize("name", ["gns", "lbs", "esparse", "lsa", "best"])
def test_shuffles_form_the_groups_of_the_base(name: str) -> None:
    pattern, some = Outliers(NM(2, 4), NM(2, 16)), shuffle(f"shuffle={name}")
    x = torch.rand(12, 51, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2, 51)
    order_I = some.order(x, pattern)
    assert order_I is not None and torch.equal(order_I, some.order(x, NM(2, 4)))
    assert not torch.equal(order_I, torch.arange(51))
    assert order_I.sort().values.tolist() == list(range(51))
    assert order_I[48:].tolist() == [48, 49, 50]
    grouping = Grouping(pattern, order_I)
    assert grouping.holds(grouping.keep_top(x))
    assert some.order(x[:, :3], pattern) is None


@patterns
def test_without_groups_a_shuffle_has_nothing_to_order(pattern: Pattern) -> None:
    for name in ("none", "gns", "lbs", "esparse", "lsa", "best"):
        some = shuffle(f"shuffle={name}")
        some.check(pattern)
        order_I = some.order(torch.rand(9, 38), pattern)
        assert (order_I is not None) == (name != "none" and pattern.swap_width is not None)


def test_a_block_is_compared_with_the_bases_groups() -> None:
    small = shuffle("shuffle=esparse", "shuffle.block=16")
    small.check(parse("4:8", "16:256"))
    with pytest.raises(ValueError, match=r"fewer than two groups of 16.*use at least 32"):
        small.check(parse("8:16", "16:256"))
