"""The command line as a process: exit codes, the terminal, and how a mistake ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf.errors import MissingMandatoryValue

from esparse.cli.call import FAILED, MISTAKE, call
from esparse.cli.help_text import store_not_copied
from esparse.cli.messages import say_how_tasks_are_named, say_how_to_write, sentence, wrong_word

log = logging.getLogger("esparse")


def exit_code(main: Callable[[], Any]) -> int:
    """Runs Hydra's main function; 2 if it stopped at the command line, 1 if a run failed, else 0."""
    log_to_terminal()
    if (wrong := wrong_word(sys.argv[1:])) is not None:
        print(f"esparse: {wrong}", file=sys.stderr)
        return MISTAKE
    try:
        with store_not_copied():
            main()
    except SystemExit as stop:
        # Hydra ends with 1 when it cannot compose the configuration: nothing has begun then.
        if stop.code not in (0, None) and not call.begun:
            say_how_tasks_are_named(sys.argv[1:])
            say_how_to_write(sys.argv[1:])
            return MISTAKE
        return stop.code if isinstance(stop.code, int) else FAILED
    except KeyboardInterrupt:
        print("esparse: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    return call.code


@contextmanager
def mistakes() -> Iterator[None]:
    """Turns a setting that makes no sense into one sentence and exit code 2."""
    try:
        yield
    except MissingMandatoryValue as error:
        print(f"esparse: {error.full_key} has no value yet: set {error.full_key}=...", file=sys.stderr)
        raise SystemExit(MISTAKE) from None
    except ValueError as error:
        print(f"esparse: {sentence(error)}", file=sys.stderr)
        raise SystemExit(MISTAKE) from None


def log_to_terminal() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG)
    log.propagate = False


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def quiet_libraries() -> None:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    disable_progress_bar()
