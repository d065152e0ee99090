"""What people are told in one sentence: a failure, a mistake, and how things are written on the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

# How the host's memory, the device's and the system's file maps say that there is no more.
NO_MEMORY = ("out of memory", "t allocate memory", "Cannot allocate memory")


def say_failed(error: Exception, name: str, folder: Path) -> None:
    said = f"esparse: {name} failed: {sentence(error)}"
    if not isinstance(error, ValueError | OSError | MemoryError) and not lacks_memory(error):  # not foreseen
        said += f" ({type(error).__name__}; the traceback is in {folder / 'run.log'})"
    print(said, file=sys.stderr)


def sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if lacks_memory(error):
        return (
            f"not enough memory ({text or type(error).__name__}): model.store=shards holds one block at a time, "
            "model.activations=disk no hidden states, a smaller model.batch_tokens fewer values inside a block"
        )
    return text or type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(said in str(error) for said in NO_MEMORY)


def say_how_tasks_are_named(words: Sequence[str]) -> None:
    """Where tasks of lm-eval were given as if they were options; Hydra itself only lists the options."""
    options = {path.stem for path in (Path(__file__).parents[2] / "conf" / "zeroshot").glob("*.yaml")}
    for word in words:
        given = re.fullmatch(r"zeroshot=(.+)", word)
        names = re.findall(r"[^\[\],'\"\s]+", given[1]) if given else []
        if given and (not options.issuperset(names) or given[1].startswith("[")):
            print(f"esparse: tasks are named by zeroshot.tasks=[{','.join(names)}], not by {word}", file=sys.stderr)
