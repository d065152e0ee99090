"""One call of launch.py: each run's folder, log, status and errors, and the table at the end.

What a run leaves in OUTPUT_ROOT/<run id>: status.json from the beginning (queued, running, preempted, interrupted,
failed with its reason and traceback, finished), run.log (of all attempts), and at the very end result.json, whose
presence means finished. Until then blocks/ has what another attempt goes on from, and owner.json says who is at it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from esparse.cli import registry
from esparse.jobs import cluster, lock, run_states
from esparse.parts import extras
from esparse.parts.conf_folder import conf_folder
from esparse.records.report import finished, write_json
from esparse.records.report import run_id as identity

if TYPE_CHECKING:
    from esparse.parallel.ranks import Ranks
    from esparse.run.experiment import Experiment

log = logging.getLogger("esparse")

FINISHED, FAILED, MISTAKE = 0, 1, 2  # exit codes

# What this process has seen; a sweep's jobs may run elsewhere, so Sweep reads their folders instead.
# `again`: the run after the one at work prunes the same model.
_seen: dict[str, Any] = {"begun": False, "code": FINISHED, "sweep": None, "again": False}
_seen |= {"preempted": False, "submitted": False}


def exit_code(main: Callable[[], Any]) -> int:
    """Runs Hydra's main function; 2 where it stopped at the command line, 1 where a run failed, else 0."""
    log_to_terminal()
    try:
        main()
    except SystemExit as stop:
        # Hydra ends with 1 when it cannot compose the configuration: nothing has begun then.
        if stop.code not in (0, None) and not _seen["begun"]:
            _say_how_tasks_are_named(sys.argv[1:])
            return MISTAKE
        return stop.code if isinstance(stop.code, int) else FAILED
    except KeyboardInterrupt:
        print("esparse: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    return int(_seen["code"])


def _say_how_tasks_are_named(words: Sequence[str]) -> None:
    """Where tasks of lm-eval were given as if they were options; Hydra itself only lists the options."""
    options = {path.stem for path in (conf_folder() / "zeroshot").glob("*.yaml")}
    for word in words:
        given = re.fullmatch(r"zeroshot=(.+)", word)
        names = re.findall(r"[^\[\],'\"\s]+", given[1]) if given else []
        if given and (not options.issuperset(names) or given[1].startswith("[")):
            print(f"esparse: tasks are named by zeroshot.tasks=[{','.join(names)}], not by {word}", file=sys.stderr)


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


def carry_out(
    experiment: Experiment,
    settings: dict[str, Any],
    *,
    sweep: Path | None = None,
    to_come: Iterable[tuple[Path, Mapping[str, Any]]] = (),
) -> dict[str, Any] | None:
    """Carries out one run unless it is finished already; a failure is written down and does not end a sweep.

    Returns its record, None where there is none. `sweep`: the folder of the sweep that this process is a job of.
    `to_come`: folders and settings of the runs that follow in this process.
    """
    run_id, name = identity(settings), registry.title(settings)
    folder = Path(experiment.output_root) / run_id
    _seen["begun"] = True
    if in_sweep := sweep.name if sweep else _seen["sweep"]:
        experiment.tracking.in_sweep(in_sweep)
    if experiment.dry_run:
        _plan(experiment, name)
        return None
    record = None if experiment.rerun else finished(folder)
    if record is not None:
        _tidy(folder)
        log.info("%s was run before (%s); rerun=true repeats it", name, folder)
    else:
        _seen["again"] = _again(settings, to_come)
        record = _owned_attempt(experiment, settings, sweep, run_id=run_id, name=name, folder=folder)
    if record is None:
        _seen["code"] = FAILED
    elif not (sweep or _seen["sweep"]):
        _print_table([record], [])
    return record


def carry_out_all(settings: Sequence[dict[str, Any]]) -> None:
    """Carries out runs of this call's sweep one after the other in this process."""
    for i, each in enumerate(settings):
        to_come = ((run_states.folder_of(later), later) for later in settings[i + 1 :])
        carry_out(registry.rebuilt(each), each, to_come=to_come)


def _again(settings: Mapping[str, Any], to_come: Iterable[tuple[Path, Mapping[str, Any]]]) -> bool:
    """Whether the next run of this process that has no record yet prunes the same model."""
    for folder, later in to_come:
        if later["rerun"] or finished(folder) is None:
            return bool(later["model"] == settings["model"])
    return False


def _tidy(folder: Path) -> None:
    """Does what a run that was killed right behind its record had left to do."""
    shutil.rmtree(folder / "blocks", ignore_errors=True)
    for draft in folder.glob("*.part"):
        draft.unlink(missing_ok=True)
    there = lock.read(folder)
    if there is not None and not lock.alive(folder, there, cluster.Queue()):
        lock.release(folder, there)
    status = run_states.status(folder)
    if status.get("status") not in (None, "finished"):
        write_json(folder / "status.json", status | {"status": "finished"})


def _plan(experiment: Experiment, name: str) -> None:
    """Prints what a run would take; it leaves no files."""
    from esparse.run.experiment import dry_run

    _quiet_libraries()
    try:
        print(dry_run(experiment, name=name))
    except (ValueError, OSError) as error:
        print(f"esparse: {name} failed: {_sentence(error)}", file=sys.stderr)
        _seen["code"] = FAILED


def _owned_attempt(
    experiment: Experiment, settings: dict[str, Any], sweep: Path | None, *, run_id: str, name: str, folder: Path
) -> dict[str, Any] | None:
    """Attempts the run unless another process is at it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.owned(folder, sweep.name if sweep else None, comes_back=lambda: bool(_seen["preempted"])) as mine:
            if experiment.rerun:
                clear(folder)
            elif (record := finished(folder)) is not None:  # while this process waited for its turn
                return record
            status = {"id": run_id, "name": name, "host": mine.host, "pid": mine.pid, "job": mine.job}
            status["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            return _attempt(experiment, settings, status, folder)
    except lock.Busy as busy:
        print(f"esparse: {name} is {busy.owner} and is not run twice ({folder})", file=sys.stderr)
    except OSError as error:  # not even the status could be written
        print(f"esparse: {name} failed: {_sentence(error)}", file=sys.stderr)
    return None


def clear(folder: Path) -> None:
    """Removes what earlier attempts left, so that a run begins anew."""
    (folder / "result.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "blocks", ignore_errors=True)
    (folder / "run.log").unlink(missing_ok=True)


def _attempt(
    experiment: Experiment, settings: dict[str, Any], status: dict[str, Any], folder: Path
) -> dict[str, Any] | None:
    name = status["name"]
    (folder / "result.json").unlink(missing_ok=True)  # a damaged one
    write_json(folder / "status.json", status | {"status": "running"})
    with _log_to_file(folder / "run.log"):
        log.info("%s -> %s", name, folder)
        try:
            return _run(experiment, settings, status, folder)
        except Exception as error:
            trace = traceback.format_exc()
            log.debug("%s", trace)
            _say_failed(error, name, folder)
            status |= {"status": "failed", "reason": _sentence(error), "traceback": trace}
            write_json(folder / "status.json", status)
            return None
        except BaseException:  # Ctrl-C, or the signal of a job that is preempted or reaches its time limit
            how = "preempted" if _seen["preempted"] else "interrupted"
            log.info("%s: the next attempt goes on behind the last finished block", how)
            write_json(folder / "status.json", status | {"status": how})
            raise


def preempted() -> None:
    """The job of this process is about to be put back into the queue."""
    _seen["preempted"] = True


def _run(experiment: Experiment, settings: dict[str, Any], status: dict[str, Any], folder: Path) -> dict[str, Any]:
    from esparse.parallel.ranks import together
    from esparse.run import experiment as one_run
    from esparse.run.measure import dense_known  # torch is loaded from here on

    devices = experiment.devices()
    asked = {"run_id": status["id"], "name": status["name"], "config": settings, "folder": folder}
    if len(devices) == 1:
        _quiet_libraries()
        record = one_run.run(experiment, **asked, again=_seen["again"])
    else:
        log.info("the sequences are dealt out to %d processes on %s", len(devices), ", ".join(map(str, devices)))
        try:
            record, dense = together(devices, _take_part, experiment, asked, dense_known)
        except ValueError:
            shutil.rmtree(folder / "blocks", ignore_errors=True)  # as the journal does where its own process sees it
            raise
        dense_known.clear()
        dense_known.update(dense)
    write_json(folder / "status.json", status | {"status": "finished"})
    return record


def _take_part(
    ranks: Ranks, experiment: Experiment, asked: dict[str, Any], known: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run as one process of several sees it; the record, and what is known of the dense model from then on."""
    from esparse.run import experiment as one_run
    from esparse.run.measure import dense_known

    _quiet_libraries()
    dense_known.update(known)
    if not ranks.leads:  # what it has to say the first one says, too
        log.handlers[:] = [logging.NullHandler()]
        log.propagate = False
        return one_run.run(experiment, **asked, ranks=ranks), {}
    log_to_terminal()
    with _log_to_file(asked["folder"] / "run.log"):
        return one_run.run(experiment, **asked, ranks=ranks), dense_known


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
    if isinstance(error, ModuleNotFoundError) and (missing := extras.sentence(error.name or "")):
        return missing
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
        _seen["sweep"] = Path(config.hydra.sweep.dir).name
        asked.clear()
        with mistakes(), contextlib.suppress(ConfigCompositionException):  # Hydra itself reports those, next
            asked.update({tuple(overrides): _composed(config, overrides) for overrides in _jobs(config)})

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if _seen["submitted"] or all(settings["dry_run"] for settings in asked.values()):
            return
        ends = {run_states.folder_of(settings): registry.title(settings) for settings in asked.values()}
        _seen["begun"] = True
        _seen["code"] = end_of_sweep(Path(config.hydra.sweep.dir), ends, run_states.looked(ends))


# The runs of this call's sweep, as they were checked: overrides -> resolved settings.
asked: dict[tuple[str, ...], dict[str, Any]] = {}


def give_away(submit: Callable[[], bool], settings: Sequence[dict[str, Any]]) -> None:
    """Lets a queue carry out the runs of this call; `submit` returns whether it waited until they ended.

    Plans are made here: they take no node.
    """
    if plans := [each for each in settings if each["dry_run"]]:
        carry_out_all(plans)
        return
    _seen["begun"] = True
    try:
        with mistakes():
            _seen["submitted"] = not submit()
    except OSError as error:
        print(f"esparse: {_sentence(error)}", file=sys.stderr)
        raise SystemExit(FAILED) from None


def end_of_sweep(sweep: Path, names: Mapping[Path, str], states: Mapping[Path, run_states.State]) -> int:
    """Prints the table of all runs, and how to upload them; the exit code."""
    records = [record for folder in names if (record := finished(folder)) is not None]
    missing = [
        ("failed" if state.kind in run_states.FAILED else "not finished", name, state.text)
        for folder, name in names.items()
        if (state := states[folder]).kind != "finished"
    ]
    _print_table(records, missing)
    if offline := [run for folder in names for run in sorted(folder.glob("wandb/offline-run-*"))]:
        list_of_runs = sweep / "wandb-runs.txt"
        list_of_runs.write_text("".join(f"{run.absolute()}\n" for run in offline))
        log.info("to upload these runs to W&B: xargs -d '\\n' wandb sync < %s", shlex.quote(str(list_of_runs)))
    return FAILED if missing else FINISHED


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's basic sweeper multiplies them out."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    in_file = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [f"{key}={value}" for key, value in in_file.items()] + list(config.hydra.overrides.task)
    overrides = OverridesParser.create().parse_overrides(texts)
    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def _composed(sweep: DictConfig, overrides: list[str]) -> dict[str, Any]:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    config = hydra.config_loader.load_sweep_config(sweep, overrides)
    return registry.resolved(config, registry.build(config), config.hydra.runtime.choices)


def _print_table(records: list[dict[str, Any]], missing: list[tuple[str, str, str]]) -> None:
    from rich.console import Console

    from esparse.reports.formats import runs_table

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=160)
    console.print(runs_table(records, missing))


def log_to_terminal() -> None:
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
