"""Manages a sweep in a queue, from any terminal: `python -m esparse.sweep status|wait|cancel|resubmit DIR`.

DIR is a sweep's folder, OUTPUT_ROOT/sweeps/<time>, and all that these commands need beside the queue itself. `release`
takes a run's folder instead.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from esparse.cli.call import FAILED, FINISHED, MISTAKE
from esparse.cli.end_of_sweep import end_of_sweep
from esparse.cli.main import log_to_terminal
from esparse.errors import Mistake
from esparse.jobs import cluster, lock, run_states
from esparse.jobs.launchers import LAUNCHERS
from esparse.records.report import write_json
from esparse.sweeps.folder import Folder, Run
from esparse.sweeps.submission import launcher_of, submit

log = logging.getLogger("esparse")

POLL_S = (1.0, 15.0)  # seconds between two checks of the runs while waiting: at first, at most
SAY_S = 30.0  # seconds between two log lines about them


def launch(path: Path, executor: str, launcher: dict[str, Any], asked: Sequence[Mapping[str, Any]]) -> bool:
    """Submits a sweep, and waits for its end if `launcher` says so; returns whether it waited.

    Raises ValueError for wrong settings of the launcher, OSError if the queue refuses the sweep.
    """
    LAUNCHERS[executor](**launcher)
    sweep = Folder.create(path, executor, launcher, asked)
    submit_and_say(sweep, sweep.runs)
    if not launcher["wait"]:
        command = "python -m esparse.sweep"
        log.info("not waited for: %s status|wait|cancel %s", command, path)
        return False
    try:
        wait(sweep)
        return True
    except KeyboardInterrupt:
        log.info("the jobs go on: python -m esparse.sweep status|wait|cancel %s", path)
        raise


def submit_and_say(sweep: Folder, chosen: Sequence[Run]) -> None:
    jobs, left_out = submit(sweep, chosen)
    for run in chosen:
        if run.id in left_out:
            log.info("%s is not submitted: %s (%s)", run.name, left_out[run.id], run.folder)
    if jobs:
        ids = sorted({job.partition("_")[0] for job in jobs.values()})
        shown = ", ".join(ids[:4]) + (f", ... ({len(ids)} jobs)" if len(ids) > 4 else "")
        tasks = len(set(jobs.values()))
        log.info("%d runs submitted as job %s (%d at a time at most)", len(jobs), shown, _at_a_time(sweep, tasks))
    log.info("logs: %s", sweep.path / "jobs")
    log.info("records: %s", ", ".join(sorted({str(run.folder.parent) for run in sweep.runs})))


def _at_a_time(sweep: Folder, tasks: int) -> int:
    return min(tasks, launcher_of(sweep).array_parallelism)


def wait(sweep: Folder) -> dict[Path, run_states.State]:
    """Returns when no run is queued or running any more."""
    pause, shown, said_at = POLL_S[0], "", float("-inf")
    while True:
        states = run_states.states_of(run.folder for run in sweep.runs)
        now = run_states.counted(states.values())
        over = not any(state.kind in run_states.OPEN for state in states.values())
        if now != shown and (over or time.monotonic() - said_at > SAY_S):
            log.info("%d runs: %s", len(states), now)
            shown, said_at = now, time.monotonic()
        if over:
            return states
        time.sleep(pause)
        pause = min(1.2 * pause, POLL_S[1])


def _status(sweep: Folder, options: argparse.Namespace) -> int:
    states = run_states.states_of(run.folder for run in sweep.runs)
    _print_states(sweep, states)
    return FAILED if any(s.kind not in ("finished", *run_states.OPEN) for s in states.values()) else FINISHED


def _print_states(sweep: Folder, states: Mapping[Path, run_states.State]) -> None:
    print(f"{sweep.path}: {len(states)} runs, {run_states.counted(states.values())}")
    width = max(len(run.name) for run in sweep.runs)
    order = {kind: place for place, kind in enumerate(run_states.KINDS)}
    for run in sorted(sweep.runs, key=lambda run: order[states[run.folder].kind]):
        state = states[run.folder]
        print(f"{run.id}  {run.name:{width}}  {state.kind}: {state.text}" if state.text else run.name)


def _wait(sweep: Folder, options: argparse.Namespace) -> int:
    states = wait(sweep)
    return end_of_sweep(sweep.path, {run.folder: run.settings for run in sweep.runs}, states)


def _cancel(sweep: Folder, options: argparse.Namespace) -> int:
    """Only what this sweep submitted: a run that another one is at stays."""
    states = run_states.states_of(run.folder for run in sweep.runs)
    ours = {
        run.folder: owner
        for run in sweep.runs
        if (owner := states[run.folder].owner) is not None and owner.sweep == sweep.path.name and owner.job
    }
    refused = cluster.cancel(sorted({owner.job for owner in ours.values() if owner.job}))
    if refused is not None:
        print(f"esparse: not cancelled: {refused}", file=sys.stderr)
        return FAILED
    until = time.monotonic() + lock.PATIENCE_S
    queue = cluster.Queue()
    left = dict(ours)
    while left and time.monotonic() < until:  # until nobody writes to the runs any more
        left = {f: o for f, o in left.items() if run_states.state_of(f, queue).kind in run_states.OPEN}
        time.sleep(0.2 if left else 0)
    cancelled = [f for f in ours if f not in left and run_states.state_of(f, queue).kind != "finished"]
    for folder in cancelled:
        write_json(folder / "status.json", run_states.status(folder) | {"status": "cancelled"})
        lock.release(folder, ours[folder])
    print(f"{len(cancelled)} runs cancelled")
    for folder, owner in left.items():
        print(f"esparse: {folder} is still {owner}", file=sys.stderr)
    return FAILED if left else FINISHED


def _resubmit(sweep: Folder, options: argparse.Namespace) -> int:
    """The runs that failed or died; without --failed also those that were cancelled or never started."""
    states = run_states.states_of(run.folder for run in sweep.runs)
    kinds = set(run_states.FAILED) if options.failed else set(run_states.KINDS) - {"finished", *run_states.OPEN}
    chosen = [run for run in sweep.runs if states[run.folder].kind in kinds]
    if not chosen:
        print(f"nothing to submit: {len(states)} runs, {run_states.counted(states.values())}")
        return FINISHED
    submit_and_say(_changed(sweep, options.settings), chosen)
    return FINISHED


def _changed(sweep: Folder, settings: Sequence[str]) -> Folder:
    """The sweep with other settings of its launcher; raises ValueError for an unknown setting."""
    try:
        schema = OmegaConf.structured(LAUNCHERS[sweep.executor])
        merged = OmegaConf.merge(schema, sweep.launcher, OmegaConf.from_dotlist(list(settings)))
    except OmegaConfBaseException as error:
        raise Mistake(str(error).splitlines()[0]) from None
    launcher: Any = OmegaConf.to_container(merged)
    launcher.pop("_target_", None)
    return Folder(sweep.path, sweep.executor, launcher, sweep.cwd, sweep.runs)


def _release(folder: Path) -> int:
    """Unlocks a run whose owner is dead or cannot be checked from here."""
    if not (folder / "status.json").exists() and not (folder / "owner.json").exists():
        print(f"esparse: {folder} is no run's folder (OUTPUT_ROOT/<run id>)", file=sys.stderr)
        return MISTAKE
    try:
        owner = lock.give_up(folder, cluster.Queue())
    except lock.Busy as busy:
        print(f"esparse: {folder} is not given up: it is {busy.owner}", file=sys.stderr)
        return FAILED
    if owner is None:
        print(f"{folder} is nobody's")
        return FINISHED
    written = run_states.status(folder)
    if written.get("status") in ("queued", "running"):
        write_json(folder / "status.json", written | {"status": "interrupted"})
    print(f"{folder} is given up: it was {owner}; if started again, it continues after its last finished block")
    return FINISHED


COMMANDS: dict[str, tuple[Callable[[Folder, argparse.Namespace], int], str]] = {
    "status": (_status, "how each run stands"),
    "wait": (_wait, "until all runs have ended, then print their table"),
    "cancel": (_cancel, "take what this sweep has in the queue out of it"),
    "resubmit": (_resubmit, "submit what has ended without a record, to go on where it was"),
}


RELEASE = "give up one run that nobody has any more, so that it can be run again"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all is well, 1 a run has failed or Slurm refuses, 2 a mistake."""
    parser = argparse.ArgumentParser(prog="python -m esparse.sweep", description="A sweep in a queue.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, explained) in COMMANDS.items():
        command = commands.add_parser(name, help=explained, description=explained)
        if name == "resubmit":
            command.add_argument("--failed", action="store_true", help="only what failed or died")
        command.add_argument("folder", type=Path, metavar="DIR", help="OUTPUT_ROOT/sweeps/<time>")
        if name == "resubmit":
            more = "settings of the launcher, e.g. timeout_min=240"
            command.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=more)
    released = commands.add_parser("release", help=RELEASE, description=RELEASE)
    released.add_argument("folder", type=Path, metavar="RUN", help="OUTPUT_ROOT/<run id>")
    options = parser.parse_args(argv)
    log_to_terminal()
    if options.command == "release":
        return _release(options.folder)
    try:
        sweep = Folder.read(options.folder)
    except (FileNotFoundError, NotADirectoryError):
        folders = sorted(str(path.parent) for path in options.folder.glob("sweeps/*/sweep.json"))
        hint = f"; there is {', '.join(folders)}" if folders else ""
        print(f"esparse: {options.folder} has no sweep.json{hint}", file=sys.stderr)
        return MISTAKE
    try:
        return COMMANDS[options.command][0](sweep, options)
    except ValueError as error:
        print(f"esparse: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:
        print(f"esparse: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130
