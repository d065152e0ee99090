"""A test that changes a setting of the process fails, and the setting is as it was for the next test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.process_state import SETTINGS, left_as_found

CHANGES: dict[str, Callable[[Path], object]] = {
    "torch's number of threads": lambda _: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's default dtype": lambda _: torch.set_default_dtype(torch.float64),
    "torch's deterministic algorithms": lambda _: torch.use_deterministic_algorithms(True, warn_only=True),
    "cuDNN's deterministic algorithms": lambda _: setattr(torch.backends.cudnn, "deterministic", True),
    "the precision of float32 products": lambda _: torch.set_float32_matmul_precision("medium"),
    "whether gradients are recorded": lambda _: torch.set_grad_enabled(False),
    "the working directory": os.chdir,
    "the environment": lambda _: os.environ.update(ESPARSE_OF_A_TEST="1"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_setting_is_named_and_set_back(name: str, tmp_path: Path) -> None:
    found = SETTINGS[name][0]()
    with pytest.raises(AssertionError, match=f"left settings .*{name}"), left_as_found():
        CHANGES[name](tmp_path)
        assert SETTINGS[name][0]() != found
    assert SETTINGS[name][0]() == found


def test_a_variable_that_was_removed_or_changed_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPARSE_REMOVED", "here")
    monkeypatch.setenv("ESPARSE_CHANGED", "before")
    with pytest.raises(AssertionError, match="ESPARSE_CHANGED, ESPARSE_REMOVED"), left_as_found():
        del os.environ["ESPARSE_REMOVED"]
        os.environ["ESPARSE_CHANGED"] = "after"
    assert (os.environ["ESPARSE_REMOVED"], os.environ["ESPARSE_CHANGED"]) == ("here", "before")


def test_nothing_changed_is_nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OF_A_LIBRARY", raising=False)  # is set by some libraries when they are imported
    with left_as_found():
        os.environ["OF_A_LIBRARY"] = "1"
        torch.set_num_threads(torch.get_num_threads())
