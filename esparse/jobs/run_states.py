"""The states of a sweep's runs, from their folders and from the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esparse.jobs import cluster, lock
from esparse.records.report import finished, read_json, run_id

OPEN = ("queued", "running")  # runs that will still end by themselves
FAILED = ("failed", "died")
KINDS = ("finished", "running", "queued", "failed", "died", "cancelled", "interrupted", "never started")


@dataclass(frozen=True, slots=True)
class State:
    """One of KINDS, and the rest in words."""

    kind: str
    text: str
    owner: lock.Owner | None = None


def folder_of(settings: dict[str, Any]) -> Path:
    return Path(settings["output_root"]).expanduser() / run_id(settings)


def status(folder: Path) -> dict[str, Any]:
    """The contents of status.json; empty if there is none."""
    return read_json(folder / "status.json")


def state_of(folder: Path, queue: cluster.Queue) -> State:
    """The state of a run. Asks the queue before it reads the folder, so that no end is missed in between."""
    owner = lock.read(folder)
    lives = owner is not None and lock.alive(folder, owner, queue)
    if (record := finished(folder)) is not None:
        return State("finished", f"in {record['seconds']:.0f} s")
    written = status(folder)
    before = written.get("status")
    if owner is not None and lives:
        kind = "running" if owner.state == "running" else "queued"
        waits = queue.why(owner.job, owner.cluster) if kind == "queued" and owner.job else ""
        again = f"{before} before, " if kind == "queued" and before in ("preempted", "interrupted") else ""
        return State(kind, f"{again}{owner}{f': {waits}' if waits else ''}", owner)
    if before == "failed":
        return State("failed", written["reason"])
    if before in ("cancelled", "interrupted", "preempted"):
        kind = "interrupted" if before == "preempted" else before
        return State(kind, f"{before} on {written['host']}" if written.get("host") else str(before))
    if before is None:
        return State("never started", "never started")
    job = written.get("job") or (owner.job if owner else None)
    ended = queue.state(job, owner.cluster if owner else None) if job else None
    how = f"; job {job}: {ended}" if ended in cluster.ENDED - {cluster.GONE} else f"; job {job}" if job else ""
    host = owner.host if owner is not None and owner.state == "running" else written.get("host")
    # Its owner's file is written first.
    while_ = owner.state if owner is not None else before
    return State("died", f"died while {while_}{f' on {host}' if host else ''}{how}")


def states_of(folders: Iterable[Path]) -> dict[Path, State]:
    queue = cluster.Queue()
    return {folder: state_of(folder, queue) for folder in folders}


def counted(states: Iterable[State]) -> str:
    """3 finished, 2 running, 1 failed"""
    counts = Counter(state.kind for state in states)
    return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) or "no runs"
