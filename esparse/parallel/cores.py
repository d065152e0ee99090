"""The cores of a CPU, each at work on its own part: small operations would otherwise wait for each other every time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch


class _Callers:
    """The threads of the process that are inside `each_core`, each with the number of threads that it had before.

    torch keeps that number for every thread, and one more for threads that never asked: a second caller would take
    the first one's 1 for its own, and leave the process with it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.before: dict[int, int] = {}
        self.usual = 1  # of the first caller


_callers = _Callers()


@contextmanager
def each_core() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch uses; inside, torch runs each operation in the thread that calls it.

    Several threads may be inside at once.
    """
    me = threading.get_ident()
    if me in _callers.before:  # inside already
        yield _pool(_callers.before[me])
        return
    with _callers.lock:
        own = torch.get_num_threads()
        if not _callers.before:
            _callers.usual = own
        before = _callers.before[me] = own if own > 1 else _callers.usual
        torch.set_num_threads(1)
        pool = _pool(before)  # its threads begin now, so that each has a torch thread to itself
    try:
        yield pool
    finally:
        with _callers.lock:
            del _callers.before[me]
            torch.set_num_threads(before)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Always the same threads: the memory that they let go of waits for their next tensors, page by page in place."""
    pool = ThreadPoolExecutor(threads, "esparse-core")
    all_there = threading.Barrier(threads)

    def begin(_: int) -> None:
        torch.get_num_threads()  # from now on this thread has the number of now
        all_there.wait()

    list(pool.map(begin, range(threads)))
    return pool


def _begin_anew() -> None:
    """In a forked process, which has the pool but not its threads, and none of the other callers."""
    global _callers
    _pool.cache_clear()
    _callers = _Callers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
