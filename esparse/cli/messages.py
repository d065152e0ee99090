"""Failures and mistakes as one sentence for the user."""

from __future__ import annotations

import sys
from pathlib import Path

from esparse.errors import Mistake
from esparse.parts import extras

# How the host's memory, the device's and the system's file maps say that there is no more.
NO_MEMORY = ("out of memory", "t allocate memory", "Cannot allocate memory")


def say_failed(error: Exception, name: str, folder: Path) -> None:
    line = f"esparse: {name} failed: {sentence(error)}"
    if not isinstance(error, Mistake | OSError | MemoryError) and not lacks_memory(error):  # not foreseen
        line += f" ({type(error).__name__}; the traceback is in {folder / 'run.log'})"
    print(line, file=sys.stderr)


def sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and (missing := extras.sentence(error.name or "")):
        return missing
    text = " ".join(str(error).split())
    if lacks_memory(error):
        return (
            f"not enough memory ({text or type(error).__name__}): model.store=shards holds one block at a time, "
            "model.activations=disk no hidden states, a smaller model.batch_tokens fewer values inside a block"
        )
    return ", ".join([text or type(error).__name__, *getattr(error, "__notes__", [])])


def lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY)
