"""Kernels where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest

from esparse import kernels


@pytest.fixture
def kernels_everywhere() -> Iterator[None]:
    """The Triton kernels are taken on every device, as they would be on a GPU; in Triton's interpreter on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton", lambda name, device: import_module(f"esparse.kernels.{name}"))
        patch.setattr(kernels, "loops", lambda name: None)
        yield
