"""What a test must leave as it found it: settings of the process, by which it would change the tests behind it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FOUND = frozenset(os.environ) - {"PYTEST_CURRENT_TEST"}
OURS = ("ESPARSE_", "SLURM_", "HYDRA_")


def _environment() -> dict[str, str]:
    """Without what a library adds for itself where it is imported."""
    return {name: value for name, value in os.environ.items() if name in FOUND or name.startswith(OURS)}


def _set_environment(values: dict[str, str]) -> None:
    for name in _environment().keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(values: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(values[0], warn_only=values[1])


def _cudnn() -> tuple[bool, bool]:
    return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


def _set_cudnn(values: tuple[bool, bool]) -> None:
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = values


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's deterministic algorithms": (_deterministic, _set_deterministic),
    "cuDNN's deterministic algorithms": (_cudnn, _set_cudnn),
    "the precision of float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the working directory": (os.getcwd, os.chdir),
    "the environment": (_environment, _set_environment),
}


@contextmanager
def left_as_found() -> Iterator[None]:
    """Sets back what was changed inside, and fails with its names."""
    before = {name: get() for name, (get, _) in SETTINGS.items()}
    yield
    changed = {}
    for name, (get, put) in SETTINGS.items():
        if (now := get()) != before[name]:
            changed[name] = _difference(before[name], now)
            put(before[name])
    assert not changed, f"the test left settings of the process changed: {changed}"


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict):
        names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return f"{', '.join(names)}"
    return f"{before} became {now}"
