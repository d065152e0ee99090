"""Asks queues about jobs: Slurm through squeue and sacct, processes of this machine through the system.

A job is named as people type it, 1234_5 or 1234 for Slurm's, local-4711 for a process of this machine. Standard library
only: a login node answers `python -m esparse.sweep status` without loading torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

GONE = "GONE"  # no queue knows the job any more
# A job in one of these will not run again.
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("TIMEOUT", "REVOKED", GONE),
}
ASKED_AGAIN_S = 2.0  # no question is put to Slurm more often
LOCAL = "local-"


@functools.cache
def machine() -> str:
    """Identifies the host, its boot and its name space of process ids, within which process ids are unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def began(pid: int) -> int | None:
    """The start of a process on this machine, in the system's ticks; None if there is none (a zombie counts as none).

    If the system does not tell the start, 0 for a process that exists.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, ValueError):
        return None  # it ended while it was read
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def own_job() -> str | None:
    """The job that this process belongs to, the innermost one: a local job may run inside an allocation of Slurm's."""
    if (local := _own_local_job()) is not None:
        return local
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task and _is_of_array(job, array, task) else job


def _own_local_job() -> str | None:
    """A job of Slurm's that was submitted from a local one has that one's variables too, but names its own kind."""
    local = os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    return f"{LOCAL}{local}" if local and os.environ.get("SUBMITIT_EXECUTOR", "local") == "local" else None


@functools.cache
def _is_of_array(job: str, array: str, task: str) -> bool:
    """Whether the job is that task; one that a task submits inherits the task's variables. Slurm itself knows."""
    output = _answer(["scontrol", "show", "job", job]) or ""
    if f"JobId={job}" not in output:
        return True  # nobody to ask
    return f"ArrayJobId={array} " in output and f"ArrayTaskId={task} " in output


def restarts() -> int:
    """The number of times that Slurm has restarted this job."""
    return 0 if _own_local_job() else int(os.environ.get("SLURM_RESTART_COUNT") or 0)


@contextlib.contextmanager
def outside_of_jobs(*, keep_slurm: bool) -> Iterator[None]:
    """While open, the environment has no variables of this process's job, so that submitted jobs get only their own.

    Otherwise an allocation's limits (SLURM_MEM_PER_CPU, ...) would count as the new job's. SLURM_CONF stays: it says
    where Slurm is. `keep_slurm`: for processes that run inside the allocation.
    """
    prefixes = ("SUBMITIT_",) if keep_slurm or "SLURM_JOB_ID" not in os.environ else ("SUBMITIT_", "SLURM_")
    taken = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith(prefixes) and key != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(taken)


@functools.cache
def name() -> str | None:
    """The Slurm cluster of this machine; None if it belongs to none or Slurm does not answer."""
    output = _answer(["scontrol", "show", "config"])
    found = re.search(r"^ClusterName\s*=\s*(\S+)", output or "", flags=re.M)
    return found.group(1) if found else None


@dataclass(slots=True)
class Queue:
    """Asks about jobs, of an array once for all its tasks, and remembers the answers for a moment."""

    _known: dict[str, tuple[float, dict[str, tuple[str, str]] | None]] = field(default_factory=dict)

    def state(self, job: str, cluster: str | None = None) -> str | None:
        """PENDING, RUNNING, ... or one of ENDED; None if this machine cannot find out.

        `cluster` is where the job was submitted: another one's ids mean nothing here.
        """
        if job.startswith(LOCAL):
            return None
        answers = self._array(job, cluster)
        return None if answers is None else answers.get(job, (GONE, ""))[0]

    def why(self, job: str, cluster: str | None = None) -> str:
        """The reason that Slurm gives: Resources, Priority, Dependency, ...; empty without one."""
        if job.startswith(LOCAL):
            return ""
        reason = (self._array(job, cluster) or {}).get(job, ("", ""))[1]
        return "" if reason == "None" else reason

    def _array(self, job: str, cluster: str | None) -> dict[str, tuple[str, str]] | None:
        array = job.partition("_")[0]
        asked, answers = self._known.get(array, (float("-inf"), None))
        if time.monotonic() - asked > ASKED_AGAIN_S:
            answers = None if cluster is not None and cluster != name() else _ask(array)
            self._known[array] = (time.monotonic(), answers)
        return answers


def _ask(array: str) -> dict[str, tuple[str, str]] | None:
    output = _answer(["squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%i|%T|%r"])
    if output is None:
        return None
    answers = {}
    for line in output.splitlines():
        job, state, reason = ([*line.strip().split("|"), "", ""])[:3]
        answers[job] = (state, reason)
    if not answers:  # squeue forgets a job after minutes; accounting, if there is any, does not
        for line in (_answer(["sacct", "-nPX", "-o", "JobID,State", "-j", array]) or "").splitlines():
            job, _, state = line.strip().partition("|")
            if state:
                answers[job] = (state.split()[0], "")  # "CANCELLED by 1000"
    return answers


def _answer(command: list[str]) -> str | None:
    """The output of a command of Slurm; empty if it does not know the job, None if it cannot be asked."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return done.stdout
    return "" if "Invalid job id" in done.stderr else None


def _tree(root: int) -> list[int]:
    """A process and all its descendants, itself first, so that none is left that could start another."""
    output = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, output.splitlines())}
    tree = [root]
    for pid in tree:
        tree.extend(child for child, parent in parents.items() if parent == pid)
    return tree


def cancel(jobs: Iterable[str]) -> str | None:
    """Cancels jobs, running or not; returns Slurm's message if it refuses."""
    slurm = []
    for job in jobs:
        if job.startswith(LOCAL):
            for pid in _tree(int(job.removeprefix(LOCAL))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            slurm.append(job)
    if not slurm:
        return None
    if shutil.which("scancel") is None:
        return "there is no scancel on this machine"
    done = subprocess.run(["scancel", *slurm], capture_output=True, text=True, timeout=120)
    return None if done.returncode == 0 else " ".join(done.stderr.split())
