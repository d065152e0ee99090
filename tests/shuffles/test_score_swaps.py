"""The gain of a swap and the search against the slow, obvious version."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esparse.patterns import NM
from esparse.shuffles.score_swaps import TOLERANCE, swap_gains, swap_greedily, swap_in_blocks

pytestmark = pytest.mark.usefixtures("loops")

PATTERNS = [NM(1, 2), NM(1, 4), NM(2, 4), NM(3, 4), NM(4, 8)]


def kept(scores: torch.Tensor, order: torch.Tensor, pattern: NM) -> float:
    """Oracle: sorts every group of the ordered scores."""
    return scores.double()[:, order].unflatten(1, (-1, pattern.m)).sort(dim=2).values[..., -pattern.n :].sum().item()


def swapped(order: torch.Tensor, left: int, right: int) -> torch.Tensor:
    order = order.clone()
    order[[left, right]] = order[[right, left]]
    return order


def drawn(seed: int, rows: int, width: int, *, ties: bool = False) -> torch.Tensor:
    """Uniform scores; with ties many of them equal, and many zero."""
    scores = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    return (scores * 4).floor() / 4 if ties else scores


@settings(max_examples=15)
@given(
    pattern=st.sampled_from(PATTERNS),
    groups=st.integers(2, 5),
    rows=st.sampled_from([1, 3, 300]),  # 300 rows and 5 groups do not fit in one tile
    seed=st.integers(0, 2**16),
    ties=st.booleans(),
)
def test_gain_is_what_a_swap_brings(pattern: NM, groups: int, rows: int, seed: int, ties: bool) -> None:
    width = groups * pattern.m
    scores = drawn(seed, rows, width, ties=ties)
    gains = swap_gains(scores[None], n=pattern.n, m=pattern.m)[0]
    own = torch.arange(width)
    for left in range(width):
        for right in range(left + 1, width):
            if left // pattern.m != right // pattern.m:
                true = kept(scores, swapped(own, left, right), pattern) - kept(scores, own, pattern)
                assert gains[left, right].item() == pytest.approx(true, abs=1e-6 * rows)
                assert gains[right, left] == gains[left, right]


@given(
    pattern=st.sampled_from(PATTERNS),
    groups=st.integers(1, 4),
    rows=st.sampled_from([1, 4, 150]),
    seed=st.integers(0, 2**16),
    ties=st.booleans(),
)
def test_the_search_ends_where_no_swap_gains(pattern: NM, groups: int, rows: int, seed: int, ties: bool) -> None:
    width = groups * pattern.m
    scores = drawn(seed, rows, width, ties=ties)
    order = swap_greedily(scores[None], n=pattern.n, m=pattern.m)[0]
    assert sorted(order.tolist()) == list(range(width))
    final = kept(scores, order, pattern)
    assert final >= kept(scores, torch.arange(width), pattern)
    for left in range(width):
        for right in range(left + 1, width):
            assert kept(scores, swapped(order, left, right), pattern) <= final * (1 + 2 * TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_blocks_advance_together_as_they_would_alone(pattern: NM) -> None:
    blocks = torch.stack([drawn(seed, 60, 48, ties=seed == 1) for seed in range(3)])
    together = swap_greedily(blocks, n=pattern.n, m=pattern.m)
    alone = [swap_greedily(block[None], n=pattern.n, m=pattern.m)[0] for block in blocks]
    assert torch.equal(together, torch.stack(alone))


def test_as_good_as_one_best_swap_at_a_time() -> None:
    """Swaps of one sweep do not touch each other, but a plain greedy would look again after each of them."""
    pattern, width = NM(2, 4), 32
    ours, plain, none = 0.0, 0.0, 0.0
    for seed in range(3):
        scores = drawn(seed, 20, width)
        order = torch.arange(width)
        while True:
            pairs = [(p, q) for p in range(width) for q in range(p + 1, width) if p // 4 != q // 4]
            best = max(pairs, key=lambda pair: kept(scores, swapped(order, *pair), pattern))
            if kept(scores, swapped(order, *best), pattern) <= kept(scores, order, pattern) * (1 + TOLERANCE):
                break
            order = swapped(order, *best)
        none += kept(scores, torch.arange(width), pattern)
        plain += kept(scores, order, pattern)
        ours += kept(scores, swap_greedily(scores[None], n=2, m=4)[0], pattern)
    assert ours >= 0.999 * plain
    assert ours - none >= 0.9 * (plain - none)


def test_the_order_does_not_depend_on_the_number_of_threads() -> None:
    scores = drawn(0, 300, 96)
    before = torch.get_num_threads()
    orders = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        orders.append(swap_in_blocks(scores, torch.arange(96), n=2, m=4, block=32))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(*orders)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_order() -> None:
    scores = drawn(0, 300, 104, ties=True)  # quarters add up exactly on any device
    for pattern in PATTERNS:
        order = swap_in_blocks(scores, torch.arange(104), n=pattern.n, m=pattern.m, block=32)
        on_gpu = swap_in_blocks(scores.cuda(), torch.arange(104).cuda(), n=pattern.n, m=pattern.m, block=32)
        assert torch.equal(on_gpu.cpu(), order)
