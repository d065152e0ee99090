"""Runs independent small tasks on one CPU thread each; threading every small operation costs a barrier each time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch


class _Callers:
    """The threads inside `each_core`, each with torch's number of threads for it before.

    torch stores that number per thread, and one more as the default of new threads: a second caller would save the
    first one's 1 as its own number, and restore that for the whole process.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.before: dict[int, int] = {}
        self.usual = 1  # of the first caller


_callers = _Callers()


@contextmanager
def each_core() -> Iterator[ThreadPoolExecutor]:
    """A pool with as many threads as torch uses; while open, torch runs each operation in its caller's thread.

    Several threads may enter at the same time.
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
        pool = _pool(before)  # starts its threads now, with one torch thread each
    try:
        yield pool
    finally:
        with _callers.lock:
            del _callers.before[me]
            torch.set_num_threads(before)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """The pool is reused so that each thread's freed memory is still mapped for its next tensors."""
    pool = ThreadPoolExecutor(threads, "esparse-core")
    all_there = threading.Barrier(threads)

    def begin(_: int) -> None:
        torch.get_num_threads()  # fixes this thread's number of torch threads
        all_there.wait()

    list(pool.map(begin, range(threads)))
    return pool


def _begin_anew() -> None:
    """Resets the state in a forked process, which inherits the pool without its threads and none of the callers."""
    global _callers
    _pool.cache_clear()
    _callers = _Callers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
