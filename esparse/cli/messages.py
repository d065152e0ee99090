"""What people are told in one sentence: a failure, a mistake, and how things are written on the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from esparse.errors import Mistake
from esparse.parts import extras
from esparse.parts.conf_folder import conf_folder

# How the host's memory, the device's and the system's file maps say that there is no more.
NO_MEMORY = ("out of memory", "t allocate memory", "Cannot allocate memory")


def say_failed(error: Exception, name: str, folder: Path) -> None:
    said = f"esparse: {name} failed: {sentence(error)}"
    if not isinstance(error, Mistake | OSError | MemoryError) and not lacks_memory(error):  # not foreseen
        said += f" ({type(error).__name__}; the traceback is in {folder / 'run.log'})"
    print(said, file=sys.stderr)


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
    return text or type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(said in str(error) for said in NO_MEMORY)


# Groups of Hydra's own, which are chosen with a slash: a dot would put a text in place of their settings.
HYDRAS = "launcher|sweeper|job_logging|hydra_logging|help|hydra_help|output|env"


def wrong_word(words: Sequence[str]) -> str | None:
    """What is wrong with a word that Hydra would take, and do nothing with; None if nothing is."""
    for word in words:
        if given := re.fullmatch(rf"(\+{{0,2}})hydra\.({HYDRAS})=(\w.*)", word):
            return f"hydra/{given[2]}={given[3]} chooses it, with a slash; {word} would change nothing"
    return None


def say_how_to_write(words: Sequence[str]) -> None:
    """What to write instead of words that Hydra's grammar refuses, or that stand where it takes none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    def reads(word: str) -> bool:
        try:
            OverridesParser.create().parse_override(word)
            return True
        except HydraException:
            return False

    settings = [word for word in words if re.match(r"[+~]{0,2}[\w./@-]+=", word)]
    for word in settings:
        key, _, value = word.partition("=")
        for parts in ([value], value.split(",")):  # one value, or several of a sweep
            better = f"{key}=" + ",".join(f'"{part}"' for part in parts)
            if not reads(word) and reads(better):
                print(f"esparse: = ~ and other signs in a value need quotes inside quotes: '{better}'", file=sys.stderr)
                break
    options = [i for i, word in enumerate(words) if word in ("-m", "--multirun")]
    if options and any(word in settings for word in words[: options[0]]):
        print("esparse: -m stands in front of all settings: python launch.py -m KEY=VALUE ...", file=sys.stderr)


def say_how_tasks_are_named(words: Sequence[str]) -> None:
    """Where tasks of lm-eval were given as if they were options; Hydra itself only lists the options."""
    options = {path.stem for path in (conf_folder() / "zeroshot").glob("*.yaml")}
    for word in words:
        given = re.fullmatch(r"zeroshot=(.+)", word)
        names = re.findall(r"[^\[\],'\"\s]+", given[1]) if given else []
        if given and (not options.issuperset(names) or given[1].startswith("[")):
            print(f"esparse: tasks are named by zeroshot.tasks=[{','.join(names)}], not by {word}", file=sys.stderr)
