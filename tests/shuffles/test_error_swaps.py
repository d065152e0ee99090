"""The search on the true error against its definition in plain loops, by hand, and against all groupings."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esparse.patterns import NM, Outliers, Pattern, Unstructured
from esparse.shuffles import Layers, Search, error_swaps
from esparse.shuffles.error_changes import ChannelBlock
from esparse.shuffles.error_swaps import block_of, ranks, rounds, squared_error, swap_by_error
from esparse.shuffles.lbs import Esparse, Lbs
from esparse.shuffles.lsa import Alternating, Lsa

PATTERNS = [NM(1, 2), NM(1, 3), NM(2, 4), NM(3, 4), NM(3, 5)]


def true_error(scores: torch.Tensor, layers: Layers, order: torch.Tensor, pattern: NM) -> float:
    """Oracle: prunes group after group in plain loops, and sums up d G d^T over the rows."""
    gram, whole = layers.gram_II.tolist(), len(order) - len(order) % pattern.m
    total = 0.0
    for row, weights in zip(scores.tolist(), layers.dense_OI.tolist(), strict=True):
        lost = {}
        for start in range(0, len(order), pattern.m):
            group = order[start : start + pattern.m].tolist()
            n = pattern.n if start < whole else -(-len(group) * pattern.n // pattern.m)
            for channel in sorted(group, key=lambda channel: (-row[channel], channel))[n:]:
                lost[channel] = weights[channel]
        total += sum(d * gram[i][j] * e for i, d in lost.items() for j, e in lost.items())
    return total


def drawn(seed: int, rows: int, width: int, *, ties: bool = False) -> tuple[torch.Tensor, Layers]:
    """Wanda's scores of a layer whose inputs are correlated; with ties many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    few = max(1, width // 3)
    hidden = torch.randn(3 * width, few, generator=generator) @ torch.randn(few, width, generator=generator)
    x = hidden + torch.randn(3 * width, width, generator=generator)
    dense, gram = torch.randn(rows, width, generator=generator), x.T @ x
    scores = dense.abs() * gram.diagonal().sqrt()
    return (scores / scores.max() * 4).floor() if ties else scores, Layers(dense, gram)


def searched(
    scores: torch.Tensor, layers: Layers, pattern: NM, start: torch.Tensor | None = None, block: int = 256
) -> torch.Tensor:
    start = torch.arange(scores.shape[1]) if start is None else start
    return swap_by_error(scores, layers.dense_OI, layers.gram_II, start, n=pattern.n, m=pattern.m, block=block)


@pytest.fixture
def to_the_end() -> Iterator[None]:
    """The search goes on until no swap gains, however little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(error_swaps, "ENOUGH", 0.0)
        yield


@given(pattern=st.sampled_from(PATTERNS), width=st.integers(4, 30), seed=st.integers(0, 2**16), objective=st.booleans())
@settings(max_examples=10)
def test_no_shuffle_ends_with_more_error_than_it_had_for_the_score(
    pattern: NM, width: int, seed: int, objective: bool
) -> None:
    scores, layers = drawn(seed, 6, width, ties=objective)
    for kind, extra in ((Lbs, {}), (Esparse, {"deal": "straight"}), *((k, _SEARCH) for k in (Lsa, Alternating))):
        start = kind(objective="score", block=12, **extra).order(scores, pattern, layers)
        order = kind(objective="error", block=12, **extra).order(scores, pattern, layers)
        if width < pattern.m:
            assert start is None and order is None
            continue
        assert start is not None and order is not None and order.dtype == torch.int64
        assert torch.equal(start, kind(objective="score", block=12, **extra).order(scores, pattern))
        assert torch.equal(start, kind(objective="error", block=12, **extra).order(scores, pattern, None))
        assert true_error(scores, layers, order, pattern) <= true_error(scores, layers, start, pattern) * (1 + 1e-6)
        whole = width - width % pattern.m
        assert order[whole:].tolist() == list(range(whole, width))
        assert (order[:whole].view(-1, pattern.m).diff(dim=1) > 0).all()
        step = 12 - 12 % pattern.m
        for begin in range(0, whole, step):
            block = slice(begin, min(begin + step, whole))
            assert sorted(order[block].tolist()) == sorted(start[block].tolist())


_SEARCH = {"deal": "serpentine", "rounds": 2}


@given(pattern=st.sampled_from(PATTERNS), groups=st.integers(2, 4), seed=st.integers(0, 2**16), tail=st.integers(0, 1))
@settings(max_examples=15)
def test_it_ends_where_no_swap_lowers_the_error(pattern: NM, groups: int, seed: int, tail: int) -> None:
    width = groups * pattern.m + tail
    scores, layers = drawn(seed, 4, width)
    start = torch.arange(width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(error_swaps, "ENOUGH", 0.0)
        order = searched(scores, layers, pattern, start)
    end = true_error(scores, layers, order, pattern)
    worth = 2 * error_swaps.TOLERANCE / groups * true_error(scores, layers, start, pattern)
    for left in range(groups * pattern.m):
        for right in range(left + 1, groups * pattern.m):
            swapped = order.clone()
            swapped[[left, right]] = order[[right, left]]
            assert true_error(scores, layers, swapped, pattern) >= end - worth


@pytest.mark.parametrize(("pattern", "width"), [(NM(1, 3), 6), (NM(2, 4), 8)], ids=str)
def test_between_the_start_and_the_best_of_all_groupings(pattern: NM, width: int, to_the_end: None) -> None:
    """There are 10 ways to split 6 channels in 3 and 3, and 35 to split 8 in 4 and 4."""
    best_found = 0
    for seed in range(12):
        scores, layers = drawn(seed, 5, width)
        firsts = [[0, *rest] for rest in combinations(range(1, width), pattern.m - 1)]
        orders = [torch.tensor(first + [c for c in range(width) if c not in first]) for first in firsts]
        best = min(true_error(scores, layers, order, pattern) for order in orders)
        end = true_error(scores, layers, searched(scores, layers, pattern), pattern)
        assert best * (1 - 1e-6) <= end <= true_error(scores, layers, torch.arange(width), pattern)
        best_found += end <= best * (1 + 1e-6)
    assert best_found >= 8  # a swap at a time leads to the very best more often than not


def test_by_hand() -> None:
    """1:2 in one row. Channels 1 and 3 carry the same signal and channel 2 its opposite.

    To keep the largest scores, 0 and 2, loses 1 and 3, whose errors add up: (1 + 1)^2 = 4. To lose 2 and 3 instead
    costs (2 - 1)^2 = 1: for that 0 and 2 have to compete.
    """
    scores = torch.tensor([[2.0, 1, 2, 1]])
    signal = torch.tensor([0.0, 1, -1, 1])
    gram = signal[:, None] * signal
    gram[0, 0] = 1
    layers = Layers(scores.clone(), gram)
    assert Lbs(objective="score", block=4).order(scores, NM(1, 2), layers).tolist() == [0, 1, 2, 3]
    order = Lbs(objective="error", block=4).order(scores, NM(1, 2), layers)
    assert sorted(order.view(2, 2).tolist()) == [[0, 2], [1, 3]]
    assert true_error(scores, layers, order, NM(1, 2)) == 1


def test_squared_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, lost = torch.randn(50, 7, generator=generator), torch.randn(3, 7, generator=generator)
    assert squared_error(lost, x.T @ x) == pytest.approx(float((x @ lost.T).square().sum()), rel=1e-5)


@pytest.mark.parametrize("groups", range(1, 9))
def test_any_two_groups_meet_once(groups: int) -> None:
    met = []
    for left, right in rounds(groups, torch.device("cpu")):
        pairs = torch.stack([left, right], dim=1)
        assert len(set(pairs.flatten().tolist())) == pairs.numel()  # no group is in two pairs of a round
        met += [tuple(sorted(pair)) for pair in pairs.tolist()]
    assert sorted(met) == list(combinations(range(groups), 2))


def test_of_two_swaps_that_spoil_each_other_one_is_made() -> None:
    """1:2 on one signal, so that E is the square of what is lost in all: 1.5 + 0 + 1.5 + 0 = 3, squared 9.

    The channels 1 and 2, and 5 and 6, can change places, either of which loses 2 less: (3 - 2)^2 = 1. Both would lose
    (3 - 4)^2 = 1 again, so the second gains nothing.
    """
    rank = torch.arange(8.0)[:, None]
    weights = torch.tensor([9.0, 1.5, -0.5, 0, 9, 1.5, -0.5, 0])[:, None]
    lost = weights * torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1])[:, None]
    gram = torch.ones(8, 8)
    block = ChannelBlock.begin(rank_CR=rank, dense_CR=weights, slope_CR=2 * gram @ lost, gram_CC=gram, n=1, m=2)
    proposed = torch.tensor([[[0, 2], [1, 3]], [[4, 6], [5, 7]]])
    assert error_swaps.together(block, proposed, 0.5) == ([0], -8.0)
    assert error_swaps.together(block, proposed[1:], 0.5) == ([0], -8.0)
    assert error_swaps.together(block, proposed, 8.5) == ([], 0.0)


@given(seed=st.integers(0, 2**16), pattern=st.sampled_from(PATTERNS))
@settings(max_examples=15)
def test_a_tournament_gains_what_it_says(seed: int, pattern: NM) -> None:
    """On inputs that are nearly one signal the swaps of a round depend on each other a great deal."""
    width = 5 * pattern.m
    scores, drawn_layers = drawn(seed, 3, width)
    layers = Layers(drawn_layers.dense_OI, torch.ones(width, width) + 0.1 * torch.eye(width))
    own = torch.arange(width)
    before = true_error(scores, layers, own, pattern)
    lost = layers.dense_OI.masked_fill(pattern.keep_top(scores), 0.0)
    block = block_of(own, ranks(scores), layers.dense_OI, lost, layers.gram_II, n=pattern.n, m=pattern.m)
    with ThreadPoolExecutor(1) as pool:
        gained = error_swaps.tournament(block, 1e-6 * before, pool)
    after = true_error(scores, layers, block.groups_GM.flatten(), pattern)
    assert gained > 0
    assert before - after == pytest.approx(gained, abs=1e-4 * before)


def test_outliers_are_left_to_the_pattern() -> None:
    scores, layers = drawn(3, 8, 32)
    shuffle = Lbs(objective="error", block=32)
    order = shuffle.order(scores, Outliers(NM(2, 4), NM(4, 16)), layers)
    assert torch.equal(order, shuffle.order(scores, NM(2, 4), layers))


@pytest.mark.parametrize("pattern", [Unstructured(50), NM(8, 16)], ids=str)
def test_without_groups_there_is_nothing_to_order(pattern: Pattern) -> None:
    scores, layers = drawn(0, 3, 12)
    assert Lbs(objective="error", block=32).order(scores, pattern, layers) is None


def test_an_error_of_zero_leaves_the_start() -> None:
    scores, layers = drawn(0, 3, 16)
    start = torch.arange(16)
    assert torch.equal(searched(scores, Layers(layers.dense_OI, torch.zeros(16, 16)), NM(2, 4)), start)
    assert torch.equal(searched(scores, Layers(torch.zeros(3, 16), layers.gram_II), NM(2, 4)), start)


def test_the_order_depends_neither_on_threads_nor_on_inference_mode() -> None:
    scores, layers = drawn(0, 40, 48)
    before, orders = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        orders += [searched(scores, layers, NM(2, 4)), searched(scores, layers, NM(2, 4))]
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    with torch.inference_mode():
        scores, layers = drawn(0, 40, 48)
        orders.append(searched(scores, layers, NM(2, 4)))
    orders.append(searched(scores.clone(), Layers(layers.dense_OI.clone().requires_grad_(), layers.gram_II), NM(2, 4)))
    assert all(torch.equal(order, orders[0]) for order in orders)
    assert not torch.equal(orders[0], torch.arange(48))


def test_only_the_error_asks_for_the_gram_matrix() -> None:
    assert set(Lbs(objective="error", block=256).collects()) == {"gram"}
    assert Lbs(objective="score", block=256).collects() == {}


@pytest.mark.parametrize("kind", [Lbs, Esparse])
def test_an_unknown_objective_says_what_there_is(kind: type[Search]) -> None:
    with pytest.raises(ValueError, match=r"shuffle.objective.*score, error.*perplexity"):
        kind(objective="perplexity", block=256, **({"deal": "straight"} if kind is Esparse else {}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_lowers_the_error_as_much() -> None:
    scores, layers = drawn(0, 300, 104)
    start = torch.arange(104)
    on_gpu = swap_by_error(
        scores.cuda(), layers.dense_OI.cuda(), layers.gram_II.cuda(), start.cuda(), n=2, m=4, block=256
    )
    ends = [true_error(scores, layers, order, NM(2, 4)) for order in (searched(scores, layers, NM(2, 4)), on_gpu.cpu())]
    assert ends[1] == pytest.approx(ends[0], rel=1e-2)
