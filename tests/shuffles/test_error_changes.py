"""What a swap changes in the error, against the error recomputed, at the start and after other swaps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esparse.patterns import NM, Grouping
from esparse.shuffles import Layers, error_changes
from esparse.shuffles.error_changes import ChannelBlock
from esparse.shuffles.error_swaps import block_of, ranks
from tests.shuffles.test_error_swaps import PATTERNS, drawn, true_error


def blocked(scores: torch.Tensor, layers: Layers, order: torch.Tensor, pattern: NM, width: int) -> ChannelBlock:
    """The first `width` channels of the order as a block."""
    keep = Grouping(pattern, order).keep_top(scores)
    lost = layers.dense_OI.masked_fill(keep, 0.0)
    return block_of(order[:width], ranks(scores), layers.dense_OI, lost, layers.gram_II, n=pattern.n, m=pattern.m)


def assert_every_change_is_true(
    block: ChannelBlock, scores: torch.Tensor, layers: Layers, order: torch.Tensor, pattern: NM
) -> None:
    groups, m = block.groups_GM.shape
    left, right = torch.combinations(torch.arange(groups)).unbind(1)
    with ThreadPoolExecutor(1) as pool:
        changes = block.changes(left, right, pool)
    assert changes.dtype == torch.float64 and changes.shape == (len(left), m, m)
    base = true_error(scores, layers, order, pattern)
    for pair, (a, b) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        for p in range(m):
            for q in range(m):
                swapped = order.clone()
                swapped[[a * m + p, b * m + q]] = order[[b * m + q, a * m + p]]
                true = true_error(scores, layers, swapped, pattern) - base
                assert changes[pair, p, q].item() == pytest.approx(true, abs=1e-5 * base)


@settings(max_examples=12)
@given(
    pattern=st.sampled_from(PATTERNS),
    groups=st.integers(2, 3),
    outside=st.integers(0, 6),
    seed=st.integers(0, 2**16),
    ties=st.booleans(),
)
def test_a_change_is_what_the_error_changes_by(pattern: NM, groups: int, outside: int, seed: int, ties: bool) -> None:
    width = groups * pattern.m
    scores, layers = drawn(seed, 5, width + outside, ties=ties)
    order = torch.arange(width + outside)
    block = blocked(scores, layers, order, pattern, width)
    assert_every_change_is_true(block, scores, layers, order, pattern)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 3)], ids=str)
def test_after_regrouping_the_block_is_as_one_begun_anew(pattern: NM) -> None:
    """Groups 0 and 2, then 1 and 2 exchange channels. Within a group channels ascend, as the oracle needs for ties."""
    m = pattern.m
    width = 4 * m
    scores, layers = drawn(1, 6, width + 3)
    order = torch.arange(width + 3)
    block = blocked(scores, layers, order, pattern, width)
    for left, right, p, q in ((0, 2, 1, 0), (1, 2, 2, 1)):
        order[[left * m + p, right * m + q]] = order[[right * m + q, left * m + p]]
        groups = torch.tensor([left, right])
        block.regroup(groups, order[:width].view(-1, m)[groups])
    anew = blocked(scores, layers, order, pattern, width)
    places = block.groups_GM.flatten()
    assert torch.equal(places, order[:width])
    for name in ("lost_CR", "slope_CR"):
        torch.testing.assert_close(getattr(block, name)[places], getattr(anew, name), rtol=1e-5, atol=1e-3)
    for name in ("edges_G2MR", "sides_GMFR"):
        torch.testing.assert_close(getattr(block, name), getattr(anew, name), rtol=1e-5, atol=1e-3)
    assert_every_change_is_true(block, scores, layers, order, pattern)


def test_tiles_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, layers = drawn(2, 11, 20)
    block = blocked(scores, layers, torch.arange(20), NM(2, 4), 20)
    left, right = torch.combinations(torch.arange(5)).unbind(1)
    with ThreadPoolExecutor(2) as pool:
        whole = block.changes(left, right, pool)
        for tile in (1, 40, 16 * 11 * 3):  # a row, two rows, three pairs at a time
            monkeypatch.setattr(error_changes, "CPU_TILE", tile)
            torch.testing.assert_close(block.changes(left, right, pool), whole, rtol=1e-5, atol=1e-3)
