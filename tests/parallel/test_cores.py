"""Threads of torch: each caller of `each_core` has afterwards what it had before, whoever else was inside."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from esparse.parallel.cores import each_core


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_thread(work: object) -> list[int]:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(work()))  # type: ignore[operator]
    thread.start()
    thread.join(10)
    return found


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_callers_that_overlap_leave_the_process_as_it_was(first_leaves_first: bool) -> None:
    inside = [threading.Event(), threading.Event()]
    may_leave = [threading.Event(), threading.Event()]
    after: dict[int, list[int]] = {}

    def caller(which: int) -> None:
        with each_core() as pool:
            within = torch.get_num_threads()
            at_work = set(pool.map(lambda _: torch.get_num_threads(), range(8)))
            inside[which].set()
            may_leave[which].wait(10)
        after[which] = [within, *at_work, torch.get_num_threads()]

    threads = []
    for which in (0, 1):
        threads.append(threading.Thread(target=caller, args=(which,)))
        threads[-1].start()
        assert inside[which].wait(10)
    for which in (0, 1) if first_leaves_first else (1, 0):
        may_leave[which].set()
        threads[which].join(10)
    assert after == {0: [1, 1, 2], 1: [1, 1, 2]}
    assert in_a_thread(torch.get_num_threads) == [2] and torch.get_num_threads() == 2


def test_a_caller_inside_stays_inside_when_a_nested_one_leaves() -> None:
    with each_core() as pool:
        with each_core() as nested:
            assert nested is pool
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert pool._max_workers == 2
