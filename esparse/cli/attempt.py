"""Carries out one run, or several in a row: folder, log, status, and ownership of the run.

Files in OUTPUT_ROOT/<run id>: status.json from the beginning (queued, running, preempted, interrupted, failed with its
reason and traceback, finished), run.log (of all attempts), and at the very end result.json, whose presence means
finished. Until then blocks/ has the state from which another attempt continues, and owner.json names the owner.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.cli import registry
from esparse.cli.call import FAILED, call
from esparse.cli.earlier import differs
from esparse.cli.end_of_sweep import print_table, say_places
from esparse.cli.main import log_to_file, log_to_terminal, quiet_libraries
from esparse.cli.messages import say_failed, sentence
from esparse.errors import Mistake
from esparse.jobs import lock, run_states
from esparse.records.groups import display_name
from esparse.records.report import finished, write_json
from esparse.records.report import run_id as id_of

if TYPE_CHECKING:
    from esparse.parallel.ranks import Ranks
    from esparse.run.settings import Experiment

log = logging.getLogger("esparse")


def carry_out(
    experiment: Experiment,
    settings: dict[str, Any],
    *,
    sweep: Path | None = None,
    to_come: Iterable[tuple[Path, Mapping[str, Any]]] = (),
    place: str = "",
) -> dict[str, Any] | None:
    """Carries out one run unless it is finished already; a failure is written down and does not end a sweep.

    Returns its record, None where there is none. `sweep`: the folder of the sweep that this process is a job of.
    `to_come`: folders and settings of the runs that follow in this process. `place`: `run 3 of 6`, for people.
    """
    run_id, name = id_of(settings), display_name(settings)
    folder = Path(experiment.output_root) / run_id
    call.begun = True
    if in_sweep := sweep.name if sweep else call.sweep:
        experiment.tracking.in_sweep(in_sweep)
    if experiment.dry_run:
        _plan(experiment, name)
        return None
    record = None if experiment.rerun else finished(folder)
    if record is None and not experiment.rerun and (folder / "result.json").exists():
        log.warning("%s is damaged: the run is carried out again", folder / "result.json")
    if record is None:
        call.again, call.place = _again(settings, to_come), place
        record = _owned_attempt(experiment, settings, sweep, run_id=run_id, name=name, folder=folder)
    elif (why := differs(record, settings)) is not None:
        print(f"esparse: {name} was run before ({folder}), {why}", file=sys.stderr)
        record = None
    else:
        _tidy(folder, sweep.name if sweep else None)
        log.info("%s was run before (%s); rerun=true repeats it", name, folder)
        experiment.tracking.told_again(record, folder)
    if record is None:
        call.code = FAILED
    elif not (sweep or call.sweep):
        print_table([record], [])
        say_places({folder: record})
    return record


def carry_out_all(settings: Sequence[dict[str, Any]]) -> None:
    """Carries out runs of this call's sweep one after the other in this process."""
    for i, each in enumerate(settings):
        to_come = ((run_states.folder_of(later), later) for later in settings[i + 1 :])
        place = f"run {i + 1} of {len(settings)}" if len(settings) > 1 else ""
        carry_out(registry.rebuilt(each), each, to_come=to_come, place=place)


def _again(settings: Mapping[str, Any], to_come: Iterable[tuple[Path, Mapping[str, Any]]]) -> bool:
    """Whether the next run of this process that has no record yet prunes the same model."""
    for folder, later in to_come:
        if later["rerun"] or finished(folder) is None:
            return bool(later["model"] == settings["model"])
    return False


def _tidy(folder: Path, sweep: str | None) -> None:
    """Finishes the clean-up of a run that was killed after it wrote its record, unless its process still lives."""
    status = run_states.status(folder)
    unfinished = status.get("status") not in (None, "finished")
    if not (unfinished or (folder / "blocks").exists() or any(folder.glob("*.part")) or lock.read(folder)):
        return
    with contextlib.suppress(lock.Busy, OSError), lock.owned(folder, sweep):
        shutil.rmtree(folder / "blocks", ignore_errors=True)
        for draft in folder.glob("*.part"):
            draft.unlink(missing_ok=True)
        if unfinished:
            write_json(folder / "status.json", status | {"status": "finished"})


def _plan(experiment: Experiment, name: str) -> None:
    """Prints the plan of a run; writes no files."""
    from esparse.run.dry_run import dry_run

    quiet_libraries()
    try:
        print(dry_run(experiment, name=name))
    except (ValueError, OSError) as error:
        print(f"esparse: {name} failed: {sentence(error)}", file=sys.stderr)
        call.code = FAILED


def _owned_attempt(
    experiment: Experiment, settings: dict[str, Any], sweep: Path | None, *, run_id: str, name: str, folder: Path
) -> dict[str, Any] | None:
    """Attempts the run unless another process owns it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.owned(folder, sweep.name if sweep else None, comes_back=lambda: call.preempted) as mine:
            if experiment.rerun:
                clear(folder)
            elif (record := finished(folder)) is not None:  # while this process waited for its turn
                if (why := differs(record, settings)) is None:
                    return record
                print(f"esparse: {name} was run meanwhile ({folder}), {why}", file=sys.stderr)
                return None
            status = {"id": run_id, "name": name, "host": mine.host, "pid": mine.pid, "job": mine.job}
            status["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            return _attempt(experiment, settings, status, folder)
    except lock.Busy as busy:
        print(f"esparse: {name} is {busy.owner} and is not run twice ({folder}){busy.way_out(folder)}", file=sys.stderr)
    except OSError as error:  # not even the status could be written
        print(f"esparse: {name} failed: {sentence(error)}", file=sys.stderr)
    return None


def clear(folder: Path) -> None:
    """Removes the files of earlier attempts, so that a run starts from the beginning."""
    (folder / "result.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "blocks", ignore_errors=True)
    (folder / "run.log").unlink(missing_ok=True)


def _attempt(
    experiment: Experiment, settings: dict[str, Any], status: dict[str, Any], folder: Path
) -> dict[str, Any] | None:
    name = status["name"]
    (folder / "result.json").unlink(missing_ok=True)  # a damaged one
    write_json(folder / "status.json", status | {"status": "running"})
    with log_to_file(folder / "run.log"):
        log.info("%s%s -> %s", f"{call.place}: " if call.place else "", name, folder)
        try:
            return _run(experiment, settings, status, folder)
        except Exception as error:
            trace = traceback.format_exc()
            log.debug("%s", trace)
            say_failed(error, name, folder)
            status |= {"status": "failed", "reason": sentence(error), "traceback": trace}
            write_json(folder / "status.json", status)
            return None
        except BaseException:  # Ctrl-C, or the signal of a job that is preempted or reaches its time limit
            how = "preempted" if call.preempted else "interrupted"
            log.info("%s: the next attempt goes on behind the last finished block", how)
            write_json(folder / "status.json", status | {"status": how})
            raise


def _run(experiment: Experiment, settings: dict[str, Any], status: dict[str, Any], folder: Path) -> dict[str, Any]:
    from esparse.parallel.ranks import together
    from esparse.run import experiment as one_run
    from esparse.run.measure import dense_known  # torch is loaded from here on

    devices = experiment.devices()
    asked = {"run_id": status["id"], "name": status["name"], "config": settings, "folder": folder, "place": call.place}
    if len(devices) == 1:
        quiet_libraries()
        record = one_run.run(experiment, **asked, again=call.again)
    else:
        log.info("the sequences are dealt out to %d processes on %s", len(devices), ", ".join(map(str, devices)))
        try:
            record, dense = together(devices, _take_part, experiment, asked, dense_known)
        except Mistake:
            shutil.rmtree(folder / "blocks", ignore_errors=True)  # as the journal does if its own process sees it
            raise
        dense_known.clear()
        dense_known.update(dense)
    write_json(folder / "status.json", status | {"status": "finished"})
    return record


def _take_part(
    ranks: Ranks, experiment: Experiment, asked: dict[str, Any], known: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One rank's part of a run; returns the record, and the cached results of the dense model."""
    from esparse.run import experiment as one_run
    from esparse.run.measure import dense_known

    quiet_libraries()
    dense_known.update(known)
    if not ranks.leads:  # the first rank logs the same messages
        log.handlers[:] = [logging.NullHandler()]
        log.propagate = False
        return one_run.run(experiment, **asked, ranks=ranks), {}
    log_to_terminal()
    with log_to_file(asked["folder"] / "run.log"):
        return one_run.run(experiment, **asked, ranks=ranks), dense_known
