"""One process of the tests compiles a loop of numba, the others wait and read it from the cache."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def begin() -> None:
    """Lets compilations of this process and of others beside it take turns, from now on."""
    from numba.core.dispatcher import Dispatcher

    Dispatcher.compile = _in_turn(Dispatcher.compile)


def _in_turn(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """A compilation asks the cache first, and in the end writes to it."""
    depth = 0  # a loop that calls another one compiles that, too

    @functools.wraps(compile_)
    def compile_in_turn(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            if depth > 1:
                return compile_(*args, **kwargs)
            with _alone():
                return compile_(*args, **kwargs)
        finally:
            depth -= 1

    return compile_in_turn


@contextmanager
def _alone() -> Iterator[None]:
    with (Path(tempfile.gettempdir()) / f"esparse-tests-compile-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
