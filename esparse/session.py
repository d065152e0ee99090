"""One call of launch.py: each run's folder, log, status and errors, and the table at the end.

What a run leaves in OUTPUT_ROOT/<run id>: status.json from the beginning (running, failed with its reason, finished),
run.log (of all attempts), and at the very end result.json, whose presence means finished. Until then blocks/ has what
another attempt goes on from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from esparse import schema
from esparse.report import finished, write_json
from esparse.report import run_id as identity

if TYPE_CHECKING:
    from esparse.experiment import Experiment
    from esparse.ranks import Ranks

log = logging.getLogger("esparse")

FINISHED, FAILED, MISTAKE = 0, 1, 2  # exit codes

# What this process has seen; a sweep's jobs may run elsewhere, so Sweep reads their folders instead.
_seen: dict[str, Any] = {"begun": False, "code": FINISHED, "sweep": False}


def exit_code(main: Callable[[], Any]) -> int:
    """Runs Hydra's main function; 2 where it stopped at the command line, 1 where a run failed, else 0."""
    _log_to_terminal()
    try:
        main()
    except SystemExit as stop:
        # Hydra ends with 1 when it cannot compose the configuration: nothing has begun then.
        if stop.code not in (0, None) and not _seen["begun"]:
            return MISTAKE
        return stop.code if isinstance(stop.code, int) else FAILED
    except KeyboardInterrupt:
        print("esparse: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    return int(_seen["code"])


@contextmanager
def mistakes() -> Iterator[None]:
    """Turns a setting that makes no sense into one sentence and exit code 2."""
    try:
        yield
    except MissingMandatoryValue as error:
        print(f"esparse: {error.full_key} has no value yet: set {error.full_key}=...", file=sys.stderr)
        raise SystemExit(MISTAKE) from None
    except ValueError as error:
        print(f"esparse: {_sentence(error)}", file=sys.stderr)
        raise SystemExit(MISTAKE) from None


def carry_out(experiment: Experiment, settings: dict[str, Any]) -> None:
    """Carries out one run unless it is finished already; a failure is written down and does not end a sweep."""
    run_id, name = identity(settings), schema.title(settings)
    folder = Path(experiment.output_root) / run_id
    _seen["begun"] = True
    if experiment.dry_run:
        _plan(experiment, name)
        return
    record = None if experiment.rerun else finished(folder)
    if record is not None:
        _tidy(folder)
        log.info("%s was run before (%s); rerun=true repeats it", name, folder)
    else:
        record = _attempt(experiment, settings, run_id=run_id, name=name, folder=folder)
    if record is None:
        _seen["code"] = FAILED
    elif not _seen["sweep"]:
        _print_table([record], [])


def _tidy(folder: Path) -> None:
    """Does what a run that was killed right behind its record had left to do."""
    shutil.rmtree(folder / "blocks", ignore_errors=True)
    for draft in folder.glob("*.part"):
        draft.unlink(missing_ok=True)
    status = _status(folder)
    if status.get("status") == "running":
        write_json(folder / "status.json", status | {"status": "finished"})


def _plan(experiment: Experiment, name: str) -> None:
    """Prints what a run would take; it leaves no files."""
    from esparse.experiment import dry_run

    _quiet_libraries()
    try:
        print(dry_run(experiment, name=name))
    except (ValueError, OSError) as error:
        print(f"esparse: {name} failed: {_sentence(error)}", file=sys.stderr)
        _seen["code"] = FAILED


def _attempt(
    experiment: Experiment, settings: dict[str, Any], *, run_id: str, name: str, folder: Path
) -> dict[str, Any] | None:
    status = {"id": run_id, "name": name, "host": socket.gethostname(), "pid": os.getpid()}
    status["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        if experiment.rerun:
            shutil.rmtree(folder / "blocks", ignore_errors=True)
            (folder / "run.log").unlink(missing_ok=True)
        write_json(folder / "status.json", status | {"status": "running"})
        with _log_to_file(folder / "run.log"):
            log.info("%s -> %s", name, folder)
            try:
                return _run(experiment, settings, status, folder)
            except Exception as error:
                log.debug("%s", traceback.format_exc())
                _say_failed(error, name, folder)
                write_json(folder / "status.json", status | {"status": "failed", "reason": _sentence(error)})
                return None
    except OSError as error:  # not even the status could be written
        print(f"esparse: {name} failed: {_sentence(error)}", file=sys.stderr)
        return None


def _run(experiment: Experiment, settings: dict[str, Any], status: dict[str, Any], folder: Path) -> dict[str, Any]:
    from esparse import experiment as one_run  # torch is loaded from here on
    from esparse.ranks import together

    devices = experiment.devices()
    asked = {"run_id": status["id"], "name": status["name"], "config": settings, "folder": folder}
    if len(devices) == 1:
        _quiet_libraries()
        record = one_run.run(experiment, **asked)
    else:
        log.info("the sequences are dealt out to %d processes on %s", len(devices), ", ".join(map(str, devices)))
        try:
            record, dense = together(devices, _take_part, experiment, asked, one_run.dense_known)
        except ValueError:
            shutil.rmtree(folder / "blocks", ignore_errors=True)  # as the journal does where its own process sees it
            raise
        one_run.dense_known.clear()
        one_run.dense_known.update(dense)
    write_json(folder / "status.json", status | {"status": "finished"})
    return record


def _take_part(
    ranks: Ranks, experiment: Experiment, asked: dict[str, Any], dense_known: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run as one process of several sees it; the record, and what is known of the dense model from then on."""
    from esparse import experiment as one_run

    _quiet_libraries()
    one_run.dense_known.update(dense_known)
    if not ranks.leads:  # what it has to say the first one says, too
        log.handlers[:] = [logging.NullHandler()]
        log.propagate = False
        return one_run.run(experiment, **asked, ranks=ranks), {}
    _log_to_terminal()
    with _log_to_file(asked["folder"] / "run.log"):
        return one_run.run(experiment, **asked, ranks=ranks), one_run.dense_known


# How the host's memory, the device's and the system's file maps say that there is no more.
NO_MEMORY = ("out of memory", "t allocate memory", "Cannot allocate memory")


def _say_failed(error: Exception, name: str, folder: Path) -> None:
    sentence = f"esparse: {name} failed: {_sentence(error)}"
    if not isinstance(error, ValueError | OSError | MemoryError) and not _lacks_memory(error):  # not foreseen
        sentence += f" ({type(error).__name__}; the traceback is in {folder / 'run.log'})"
    print(sentence, file=sys.stderr)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if _lacks_memory(error):
        return (
            f"not enough memory ({text or type(error).__name__}): model.store=shards holds one block at a time, "
            "model.activations=disk no hidden states, a smaller model.batch_tokens fewer values inside a block"
        )
    return text or type(error).__name__


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(said in str(error) for said in NO_MEMORY)


class Sweep(Callback):
    """Checks every run of a sweep before the first one starts, and prints one table after the last."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _seen["sweep"] = True
        self._asked: list[dict[str, Any]] = []
        with mistakes(), contextlib.suppress(ConfigCompositionException):  # Hydra itself reports those, next
            self._asked = [_composed(overrides) for overrides in _jobs(config)]

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if all(settings["dry_run"] for settings in self._asked):
            return
        records, failures = [], []
        for settings in self._asked:
            folder = Path(settings["output_root"]) / identity(settings)
            record = finished(folder)
            if record is not None:
                records.append(record)
            else:
                failures.append((schema.title(settings), _reason(folder)))
        _print_table(records, failures)
        _seen["begun"] = True
        _seen["code"] = FAILED if failures else FINISHED


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's basic sweeper multiplies them out."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    in_file = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [f"{key}={value}" for key, value in in_file.items()] + list(config.hydra.overrides.task)
    overrides = OverridesParser.create().parse_overrides(texts)
    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def _composed(overrides: list[str]) -> dict[str, Any]:
    from hydra.types import RunMode

    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    config = hydra.config_loader.load_configuration(_config_name(), overrides, RunMode.RUN)
    return schema.resolved(config, schema.build(config), config.hydra.runtime.choices)


def _config_name() -> str:
    from hydra._internal.utils import get_args_parser

    return get_args_parser().parse_args().config_name or "config"


def _status(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "status.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _reason(folder: Path) -> str:
    status = _status(folder)
    if not status:
        return "never started"
    return status.get("reason") or f"died while {status.get('status')} on {status.get('host')}"


def _print_table(records: list[dict[str, Any]], failures: list[tuple[str, str]]) -> None:
    from rich.console import Console

    from esparse.tables import runs_table

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=160)
    console.print(runs_table(records, failures))


def _log_to_terminal() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG)
    log.propagate = False


@contextmanager
def _log_to_file(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def _quiet_libraries() -> None:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    disable_progress_bar()
