"""Settings of every test: deterministic, offline, no timing; which cases run by default is in tests/kinds.py."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

from esparse import kernels
from tests import compile_once, kinds

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=15)
settings.register_profile("all", settings.get_profile("quick"), max_examples=50)


def pytest_configure(config: pytest.Config) -> None:
    kinds.all_of_what_is_named(config)
    settings.load_profile("quick" if config.option.markexpr == kinds.DEFAULT else "all")
    if not hasattr(config, "workerinput") and getattr(config.option, "numprocesses", None):
        return  # it only hands tests to workers, which wait for it: torch would take it seconds
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # chosen before any library imports Triton; runs the kernels on the CPU
    torch.set_num_threads(1)  # tensors are tiny, and two threads that wait for each other on a busy machine are slow
    if find_spec("numba") is not None:
        compile_once.begin()


@atexit.register
def _without_last_words() -> None:
    """Triton's binding would list, at the very end, what Python has not freed yet: lines that look like failures."""
    if "triton" in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kinds.mark(items)
    kinds.long_files_first(items)
    config.stash[kinds.COLLECTED] = list(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips what Triton's interpreter cannot do here: up to 3.6 it takes arrays of one value for numbers."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "InterpreterError" and "only 0-dimensional arrays" in str(error):
            pytest.skip("this Triton's interpreter does not work with NumPy 2.4 and later: pip install 'numpy<2.4'")
        raise


@pytest.fixture(autouse=True)
def the_process_is_left_as_it_was_found() -> Iterator[None]:
    """Else a test makes others fail, elsewhere; it begins with random numbers of its own, whatever ran before it."""
    import torch

    from tests.process_state import left_as_found

    torch.manual_seed(0)
    with left_as_found():
        yield


@pytest.fixture(autouse=True)
def handlers_of_the_log_go_with_their_test() -> Iterator[None]:
    """A command that was carried out in this process leaves one, whose stream pytest closes behind the test."""
    log = logging.getLogger("esparse")
    before, level = list(log.handlers), log.level
    yield
    log.handlers[:] = [handler for handler in log.handlers if handler in before]
    log.setLevel(level)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch takes, for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
