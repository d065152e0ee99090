"""Streaming statistics against plain loops, however the tokens are cut."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.stats import ColumnEntropy, ColumnMax, ColumnMoments, ColumnNorm, Gram, Statistic, TokenSample

pytestmark = pytest.mark.usefixtures("loops")

CPU = torch.device("cpu")
SIZE = {"inputs": 5, "sequences": 4, "device": CPU}


def values(tokens: int = 48, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed))
    x[:, 3] = x[:, 3].relu()  # half of it exactly zero
    x[:, 4] = 1.5  # a channel that never changes
    return x


def fed(statistic: Statistic, x_TI: torch.Tensor, cuts: list[int]) -> Statistic:
    bounds = [0, *sorted(cuts), len(x_TI)]
    for pass_index in range(statistic.passes):
        for start, end in itertools.pairwise(bounds):
            statistic.add(x_TI[start:end], pass_index)
    return statistic


def entropy_by_hand(column: list[float], low: float, high: float, bins: int) -> float:
    counts = [0] * bins
    for value in column:
        place = int((value - low) / (high - low) * bins) if high > low else 0
        counts[min(max(place, 0), bins - 1)] += 1
    shares = [count / len(column) for count in counts]
    return -sum(p * math.log(p) for p in shares if p > 0)


@given(cuts=st.lists(st.integers(0, 48), max_size=4), seed=st.integers(0, 100))
def test_the_greatest_value_is_the_greatest_however_the_tokens_are_cut(cuts: list[int], seed: int) -> None:
    x = values(seed=seed)
    greatest = fed(ColumnMax(**SIZE), x, cuts)
    assert greatest.max_I.tolist() == [max(abs(value) for value in column) for column in x.T.tolist()]
    assert greatest.tokens == 48


def test_norms_follow_their_conventions() -> None:
    x = values()
    norm = fed(ColumnNorm(**SIZE), x, [])
    sequences = x.double().view(4, 12, 5)
    # Wanda: mean over sequences of each sequence's sum of squares, then the root.
    wanda = torch.stack([sequence.square().sum(0) for sequence in sequences]).mean(0).sqrt()
    torch.testing.assert_close(norm.norm_I("sequence").double(), wanda)
    torch.testing.assert_close(norm.norm_I("rms").double(), x.double().square().mean(0).sqrt())
    torch.testing.assert_close(norm.norm_I("total").double(), x.double().norm(dim=0))


@pytest.mark.parametrize("range_", ["channel", "layer", "fixed"])
@pytest.mark.parametrize("bins", [2, 7, 100])
def test_entropy_equals_the_formula(range_: str, bins: int) -> None:
    x = values()
    got = fed(ColumnEntropy(bins=bins, range=range_, limit=1.25, **SIZE), x, [7]).entropy_I()
    for channel, column in enumerate(x.T.tolist()):
        low, high = {
            "channel": (min(column), max(column)),
            "layer": (x.min().item(), x.max().item()),
            "fixed": (-1.25, 1.25),
        }[range_]
        assert got[channel].item() == pytest.approx(entropy_by_hand(column, low, high, bins), abs=1e-5)


@pytest.mark.parametrize("channels", [1, 130, 300])  # a part of what a loop or a core takes at a time, and more
@pytest.mark.parametrize("tokens", [2, 8, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_of_several_micro_batches(channels: int, tokens: int, dtype: torch.dtype) -> None:
    """Every channel goes from its own number to 8 more, in four bins of 2."""
    x = torch.randint(9, (2, tokens, channels), generator=torch.Generator().manual_seed(tokens))
    x[0, 0], x[1, 1] = 0, 8
    parts = [(part + torch.arange(channels) % 100).to(dtype) for part in x]
    entropy = ColumnEntropy(bins=4, range="channel", limit=1.0, inputs=channels, sequences=1, device=CPU)
    for pass_index in (0, 1):
        entropy.add_all(parts, pass_index)
    expected = [[0, 0, 0, 0] for _ in range(channels)]
    for channel, column in enumerate(x.flatten(0, 1).T.tolist()):
        for value in column:
            expected[channel][min(value // 2, 3)] += 1
    assert entropy.counts_IK.tolist() == expected
    assert entropy.tokens == 2 * tokens


def test_entropy_by_hand() -> None:
    # Two bins over 0..1: three values below a half and one above: -(3/4 ln 3/4 + 1/4 ln 1/4).
    x = torch.tensor([[0.0], [0.1], [0.2], [1.0]])
    got = fed(ColumnEntropy(bins=2, range="channel", limit=1.0, inputs=1, sequences=1, device=CPU), x, [])
    assert got.entropy_I().item() == pytest.approx(0.5623351)


def test_a_constant_channel_has_no_entropy_and_a_uniform_one_the_most() -> None:
    x = torch.stack([torch.full((1000,), 3.0), torch.arange(1000.0)], dim=1)
    got = fed(ColumnEntropy(bins=100, range="channel", limit=1.0, inputs=2, sequences=1, device=CPU), x, [500])
    assert got.entropy_I()[0] == 0
    assert got.entropy_I()[1].item() == pytest.approx(math.log(100), abs=1e-3)


@given(cuts=st.lists(st.integers(0, 48), max_size=8), seed=st.integers(0, 1000))
def test_values_do_not_depend_on_micro_batches(cuts: list[int], seed: int) -> None:
    x = values(seed=seed)
    whole, parts = fed(ColumnNorm(**SIZE), x, []), fed(ColumnNorm(**SIZE), x, cuts)
    torch.testing.assert_close(whole.sum_sq_I, parts.sum_sq_I, rtol=1e-6, atol=0)
    for range_ in ("channel", "layer", "fixed"):
        entropies = [fed(ColumnEntropy(bins=20, range=range_, limit=1.0, **SIZE), x, c).entropy_I() for c in ([], cuts)]
        assert torch.equal(*entropies)
    samples = [fed(TokenSample(most=10, **SIZE), x, c).x_SI() for c in ([], cuts)]
    assert torch.equal(*samples)


@given(tokens=st.integers(0, 300), most=st.integers(1, 20))
def test_the_sample_is_as_large_as_fits_and_evenly_spaced(tokens: int, most: int) -> None:
    x = torch.arange(float(tokens))[:, None]
    sample = TokenSample(most=most, inputs=1, sequences=1, device=CPU)
    rows = fed(sample, x, [3, 50, 51, 120] if tokens > 120 else []).x_SI()[:, 0].tolist()
    golden = (1 + 5**0.5) / 2
    turns = [(i + 1) / golden % 1 for i in range(tokens)]
    assert rows == sorted(sorted(range(tokens), key=turns.__getitem__)[:most])
    if tokens > most > 1:
        assert len({right - left for left, right in itertools.pairwise(rows)}) <= 3


def test_the_sample_does_not_meet_the_same_token_of_every_sequence() -> None:
    """The first tokens of sequences carry activations a hundred times as large as others'."""
    sample = TokenSample(most=1024, inputs=1, sequences=128, device=CPU)
    rows = fed(sample, (torch.arange(128 * 512.0) % 512)[:, None], list(range(0, 128 * 512, 1024))).x_SI()
    places = rows[:, 0].int().bincount(minlength=512)
    assert places.sum() == 1024
    assert places.max() <= 6  # two on average


def test_half_precision_inputs_are_summed_in_full() -> None:
    x = torch.full((4096, 1), 300.0, dtype=torch.float16)  # the square overflows float16
    norm = fed(ColumnNorm(inputs=1, sequences=1, device=CPU), x, [])
    assert norm.norm_I("total").item() == pytest.approx(300.0 * 64)


def test_no_tokens_no_entropy() -> None:
    entropy = fed(ColumnEntropy(bins=10, range="channel", limit=1.0, **SIZE), values()[:0], [])
    assert torch.equal(entropy.entropy_I(), torch.zeros(5))


@given(cuts=st.lists(st.integers(0, 48), max_size=8), seed=st.integers(0, 1000))
def test_moments_equal_the_formulas_however_the_tokens_are_cut(cuts: list[int], seed: int) -> None:
    x = values(seed=seed) + torch.tensor([0.0, 1000.0, -3.0, 0.0, 0.0])
    moments = fed(ColumnMoments(**SIZE), x, cuts)
    assert moments.tokens == 48
    for channel, column in enumerate(x.double().T.tolist()):
        mean = sum(column) / 48
        variance = sum((value - mean) ** 2 for value in column) / 48
        assert moments.mean_I()[channel].item() == pytest.approx(mean, rel=1e-6, abs=1e-7)
        assert moments.variance_I()[channel].item() == pytest.approx(variance, rel=1e-6)
    whole = fed(ColumnMoments(**SIZE), x, [])
    for part in ("sum_I", "sum_sq_I"):
        torch.testing.assert_close(getattr(moments, part), getattr(whole, part), rtol=1e-12, atol=1e-9)


def test_a_channel_that_never_changes_has_no_variance_at_all() -> None:
    x = torch.tensor([[0.1, 1e4], [0.1, 1e4]]).repeat(500, 1)
    moments = fed(ColumnMoments(inputs=2, sequences=1, device=CPU), x, [1, 300])
    assert torch.equal(moments.mean_I(), x[0])
    assert torch.equal(moments.variance_I(), torch.zeros(2))


def test_moments_of_half_precision_inputs_and_of_none() -> None:
    x = torch.tensor([[300.0], [-300.0]], dtype=torch.float16).repeat(2048, 1)  # the square overflows float16
    moments = fed(ColumnMoments(inputs=1, sequences=1, device=CPU), x, [])
    assert (moments.mean_I().item(), moments.variance_I().item()) == (0.0, 90000.0)
    for none in (ColumnMoments(**SIZE), fed(ColumnMoments(**SIZE), values()[:0], [])):
        assert torch.equal(none.mean_I(), torch.zeros(5))
        assert torch.equal(none.variance_I(), torch.zeros(5))


@pytest.mark.parametrize("inputs", [1, 3, 8, 13, 64])
def test_the_gram_matrix_is_whole_whenever_it_is_read(inputs: int) -> None:
    """Only its upper part is summed; it may be read between two additions."""
    gram = Gram(inputs=inputs, sequences=2, device=torch.device("cpu"))
    first, second = torch.randn(2, 20, inputs, generator=torch.Generator().manual_seed(0))
    for tokens in (first, second):
        gram.add(tokens, 0)
        seen = torch.cat([first, second])[: gram.tokens]
        torch.testing.assert_close(gram.gram_II, seen.T @ seen)
        torch.testing.assert_close(gram.gram_II, gram.gram_II.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("range_", ["channel", "layer", "fixed"])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-36, 1e38, 1.7e38])
def test_ranges_at_the_ends_of_float32_have_their_entropy(size: float, range_: str, dtype: torch.dtype) -> None:
    """A dead unit of GELU or SiLU returns -1e-38; the reciprocal of such a width is no float32."""
    x = (torch.linspace(-1, 1, 64)[:, None] * size * torch.ones(5)).to(dtype)
    x[:, 0] = torch.linspace(0, 1, 64).to(dtype) if range_ == "channel" else x[:, 0]
    got = fed(ColumnEntropy(bins=20, range=range_, limit=size, **SIZE), x, [9, 30]).entropy_I()
    for channel, column in enumerate(x.double().T.tolist()):
        low, high = (-size, size) if range_ == "fixed" else (min(column), max(column))
        expected = entropy_by_hand(column, low, high, 20)
        assert got[channel].item() == pytest.approx(expected, abs=0.15), channel  # on edges of bins rounding decides
