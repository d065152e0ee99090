"""What of a block's inputs is held between two passes of its statistics."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from esparse.models import host_memory
from esparse.parallel.ranks import Ranks
from esparse.pruning.input_cache import MOST_BESIDE_HOST, InputCache, budget, room
from esparse.stats import ColumnNorm

NORM = ColumnNorm(inputs=8, sequences=1, device=torch.device("cpu"))


def x(tokens: int = 4) -> torch.Tensor:
    return torch.zeros(tokens, 8)  # 32 bytes a token


def test_whole_micro_batches_are_held_as_far_as_they_fit() -> None:
    cache, given = InputCache(32 * 10), [x(), x(), x(1), x(), x(1)]
    for batch, parts in enumerate(([given[0]], [given[1], given[2]], [given[3]], [given[4]])):
        cache.begin(batch)
        for part in parts:
            cache.add(part, NORM)
    held, inputs = cache.take()
    assert held == {0, 1}  # 9 tokens; the third does not fit, and behind it nothing is held
    assert [part.data_ptr() for part in inputs[NORM]] == [part.data_ptr() for part in given[:3]]
    assert cache.take() == (set(), {})  # they are free as soon as they were used


def test_a_micro_batch_of_which_a_part_does_not_fit_is_not_held() -> None:
    cache = InputCache(32 * 5)
    cache.begin(0)
    for part in (x(), x()):
        cache.add(part, NORM)
    assert cache.take() == (set(), {})


def test_a_micro_batch_that_shows_no_input_needs_no_second_pass() -> None:
    cache = InputCache(0)
    cache.begin(0)
    assert cache.take() == ({0}, {})


def test_what_the_block_overwrites_is_taken_again_and_the_others_are_held() -> None:
    cache, given = InputCache(2**20), [x(), x()]
    for batch, part in enumerate(given):
        cache.begin(batch)
        cache.add(part, NORM)
        if batch == 0:
            part.add_(1)
    held, inputs = cache.take()
    assert held == {1} and len(inputs[NORM]) == 1


def test_memory_is_counted_as_it_is_kept_from_being_freed() -> None:
    """A part of a tensor keeps all of it; two parts of one tensor keep it once."""
    whole = x(8)
    for tokens, fits in ((8, True), (7, False)):
        cache = InputCache(32 * tokens)
        cache.begin(0)
        cache.add(whole[:2], NORM)
        cache.add(whole[2:4], NORM)
        assert (cache.take()[0] == {0}) is fits


def test_a_gpu_that_hidden_states_are_kept_from_holds_few_inputs() -> None:
    gpu, cpu, free = torch.device("cuda"), torch.device("cpu"), 140 * 2**30
    assert room(free, gpu, beside_host=True, ranks=4) == MOST_BESIDE_HOST == 2**31
    assert room(4 * 2**30, gpu, beside_host=True, ranks=1) == 2**30
    assert room(free, gpu, beside_host=False, ranks=4) == free // 4
    assert room(free, cpu, beside_host=True, ranks=2) == free // 8


@pytest.mark.parametrize("waiting", ["cpu", "meta"])
def test_where_hidden_states_wait_decides(waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands for a GPU."""
    monkeypatch.setattr(host_memory, "free_bytes", lambda device: 2**36)
    blocks = SimpleNamespace(device=torch.device("meta"), ranks=Ranks())
    hidden = [torch.zeros(1, 2, 8, device=waiting)]
    activations = SimpleNamespace(blocks=blocks, hidden=hidden)
    assert budget(activations) == (2**31 if waiting == "cpu" else 2**34)  # type: ignore[arg-type]
