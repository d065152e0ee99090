"""Settings of every test: deterministic, offline, no timing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from esparse import kernels

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # chosen before any library imports Triton; runs the kernels on the CPU
settings.register_profile("esparse", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("esparse")
torch.set_num_threads(1)  # tensors are tiny here, and two threads that wait for each other on a busy machine are slow


@pytest.fixture(scope="module", params=["compiled", "plain"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the loops that numba compiles and without them, as where numba is not installed."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "loops", lambda name: None)
        yield
