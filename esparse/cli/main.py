"""The command line as a process: exit codes, the terminal, and how a mistake ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf.errors import MissingMandatoryValue

from esparse.cli.call import FAILED, MISTAKE, call
from esparse.cli.help_text import store_not_copied
from esparse.cli.hydra_errors import explained
from esparse.cli.messages import sentence
from esparse.cli.typed_words import arranged, check, doubled, in_hydras_words
from esparse.errors import Mistake
from esparse.parts.conf_folder import own_folder

log = logging.getLogger("esparse")

IN_FULL = "HYDRA_FULL_ERROR"  # the variable that makes Hydra raise, and that asks for a traceback


def exit_code(main: Callable[[], Any]) -> int:
    """Runs Hydra's main function; 2 if it stopped at the command line, 1 if a run failed, else 0."""
    log_to_terminal()
    try:
        sys.argv[1:] = words = in_hydras_words(arranged(sys.argv[1:]))
        check(words)
        if (own := own_folder()) is not None:
            log.info("%s stands in front of esparse's own configuration", own)
        for sentence_ in doubled(words):
            log.warning("%s", sentence_)
        with store_not_copied(), _errors_come_through(), _told_to_end():
            main()
    except _ToldToEnd as told:
        print(f"esparse: ended by {told.signal.name}; finished runs are kept", file=sys.stderr)
        return 128 + told.signal
    except SystemExit as stop:
        if stop.code not in (0, None) and not call.begun:
            return MISTAKE
        return stop.code if isinstance(stop.code, int) else FAILED
    except KeyboardInterrupt:
        print("esparse: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    except Exception as error:
        explanation = (
            None if call.begun else str(error) if isinstance(error, Mistake) else explained(error, sys.argv[1:])
        )
        if explanation is not None and IN_FULL not in os.environ:
            print(f"esparse: {explanation}", file=sys.stderr)
            return MISTAKE
        if isinstance(error, BrokenPipeError) and not call.begun:  # a reader such as `head` that has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
            return 0
        if isinstance(error, OSError) and IN_FULL not in os.environ:  # of standard output, on a full disk for instance
            kept = "; finished runs are kept" if call.begun else ""
            print(f"esparse: the output cannot be written: {sentence(error)}{kept}", file=sys.stderr)
            return FAILED
        raise
    return call.code


class _ToldToEnd(SystemExit):
    """Raised by a signal that asks the process to end, which then unwinds as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """While open, SIGTERM (kill, timeout, a job's end) and SIGHUP (a closed terminal) raise _ToldToEnd.

    Signals that somebody handles or ignores (nohup) are left alone; a second one ends the process at once.
    """

    def tell(number: int, frame: object) -> None:
        for signal_ in taken:
            signal.signal(signal_, signal.SIG_DFL)
        raise _ToldToEnd(number)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    in_main = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
    taken = [number for number in known if in_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, tell)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _errors_come_through() -> Iterator[None]:
    """While open, Hydra raises its errors instead of printing them and ending the process."""
    if IN_FULL in os.environ:
        yield
        return
    os.environ[IN_FULL] = "1"
    try:
        yield
    finally:
        del os.environ[IN_FULL]


@contextmanager
def mistakes() -> Iterator[None]:
    """Turns a wrong setting into one sentence and exit code 2."""
    try:
        yield
    except MissingMandatoryValue as error:
        print(f"esparse: {error.full_key} has no value yet: set {error.full_key}=...", file=sys.stderr)
        raise SystemExit(MISTAKE) from None
    except ValueError as error:
        print(f"esparse: {explained(error, sys.argv[1:]) or sentence(error)}", file=sys.stderr)
        raise SystemExit(MISTAKE) from None


def log_to_terminal() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG)
    log.propagate = False


class _LogFile(logging.FileHandler):
    """A log that says once that its disk is full, where logging prints a traceback for each line."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            print(
                f"esparse: cannot write {self.baseFilename}: {sentence(sys.exception() or OSError())}", file=sys.stderr
            )


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # what could not be written before cannot be now
            handler.close()


def quiet_libraries() -> None:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    disable_progress_bar()
