"""Kernels where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib import import_module

import pytest

from esparse import kernels
from esparse.shuffles import score_swaps


@pytest.fixture
def kernels_everywhere() -> Iterator[None]:
    """The Triton kernels are taken on every device, as they would be on a GPU; in Triton's interpreter on a CPU.

    One thread searches: the interpreter has one grid for all of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_swaps, "each_core", lambda: nullcontext(ThreadPoolExecutor(1)))
        patch.setattr(kernels, "triton", lambda name, device: import_module(f"esparse.kernels.{name}"))
        patch.setattr(kernels, "loops", lambda name: None)
        yield
