"""The cores of a CPU, each at work on its own part: small operations would otherwise wait for each other every time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def each_core() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch uses; inside, torch runs each operation in the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
