"""The cores of a CPU, each at work on its own part: small operations would otherwise wait for each other every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def each_core() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch uses; inside, torch runs each operation in the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _pool(before)
    finally:
        torch.set_num_threads(before)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Always the same threads: the memory that they let go of waits for their next tensors, page by page in place."""
    return ThreadPoolExecutor(threads, "esparse-core")


if hasattr(os, "register_at_fork"):  # a forked process has the pool, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
