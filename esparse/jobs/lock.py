"""Who works on a run: at most one process, of all machines that share the folder.

RUN/owner.json names it: a process that works on the run, or a job in a queue that will. It appears whole or not at all
(a hard link on a finished draft, which is atomic on NFS too, and needs no lock server), and is removed when the owner
finishes. A working owner touches it every BEAT_S. It is dead if its process is gone, which its own machine knows at
once; to other machines, if it has not touched the file for PATIENCE_S and Slurm does not say that its job runs. Clocks
of two machines are never compared: "now" is the time that the file system gives a new file.

A dead owner's run is taken over by replacing the file. A process that finds another's name in it ends at once, so that
one that was thought dead (a node cut off from the network) does no harm when it comes back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from uuid import uuid4

from esparse.jobs import cluster

log = logging.getLogger("esparse")

BEAT_S = 5.0
PATIENCE_S = 60.0
SEEN_S = 1.0  # a file that was half written when it was read is whole by then
UNREADABLE_S = 3 * BEAT_S  # in which a living owner writes its damaged file anew
FENCED = 75  # exit code of a process whose run another one took over


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, or a job in a queue; `state` is submitting, queued or running."""

    state: str
    host: str
    machine: str
    pid: int
    began: int | None
    job: str | None = None  # 1234_5, local-4711
    restarts: int = 0
    cluster: str | None = None  # Slurm's name of it
    sweep: str | None = None
    token: str = ""

    @classmethod
    def this_process(cls, state: str, sweep: str | None = None) -> Owner:
        job = cluster.own_job()
        of_slurm = job is not None and not job.startswith(cluster.LOCAL)
        return cls(
            state=state,
            host=socket.gethostname(),
            machine=cluster.machine(),
            pid=os.getpid(),
            began=cluster.began(os.getpid()),
            job=job,
            restarts=cluster.restarts(),
            cluster=os.environ.get("SLURM_CLUSTER_NAME") if of_slurm else None,
            sweep=sweep,
            token=uuid4().hex[:12],
        )

    def is_of_right_types(self) -> bool:
        """Whether every field holds what it should; a damaged file may be JSON all the same."""
        words = (self.state, self.host, self.machine, self.token)
        numbers = (self.pid, self.restarts, 0 if self.began is None else self.began)
        names = (self.job, self.cluster, self.sweep)
        return (
            all(isinstance(word, str) for word in words)
            and all(isinstance(number, int) for number in numbers)
            and all(name is None or isinstance(name, str) for name in names)
        )

    def here(self) -> bool:
        return self.machine == cluster.machine()

    def process_is_there(self) -> bool:
        return cluster.began(self.pid) == self.began

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        if self.state == "running":
            return f"running on {self.host} (process {self.pid}{job})"
        return f"queued (job {self.job})" if self.job else f"being submitted on {self.host} (process {self.pid})"


# Whose file has none of the fields that say who it is.
UNREADABLE = Owner(state="running", host="a machine that its owner.json does not name", machine="", pid=0, began=None)


class Busy(Exception):
    """Another process owns the run."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(str(owner))
        self.owner = owner

    def way_out(self, folder: Path) -> str:
        """What to do if nobody has the run any more; nothing for an owner on this machine, which is known to live."""
        if self.owner.state == "running" and self.owner.here():
            return ""
        return f"; if nobody has it any more: python -m esparse.sweep release {shlex.quote(str(folder))}"


def read(folder: Path) -> Owner | None:
    """The owner that the folder names, dead or alive."""
    return _read(_file(folder))


def _read(file: Path) -> Owner | None:
    """Fields that this version does not know, of a newer one, are left out."""
    try:
        stored = json.loads(file.read_text())
        found = Owner(**{field.name: stored[field.name] for field in fields(Owner) if field.name in stored})
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError):
        return None
    return found if found.is_of_right_types() else None


def alive(folder: Path, owner: Owner, queue: cluster.Queue) -> bool:
    """Whether an owner works on the run, or will; True if that is unknown."""
    return known_alive(folder, owner, queue) is not False


def known_alive(folder: Path, owner: Owner, queue: cluster.Queue) -> bool | None:
    """Whether an owner works on the run, or will; None if that is unknown."""
    state = queue.state(owner.job, owner.cluster) if owner.job else None
    if owner.state == "queued":
        if owner.job and owner.job.startswith(cluster.LOCAL):
            return owner.process_is_there() if owner.here() else None
        return None if state is None else state not in cluster.ENDED
    if owner.here():
        # A job that Slurm ends, or will begin again, is not over when its process is.
        return owner.process_is_there() or (owner.sweep is not None and state not in {None} | cluster.ENDED)
    if state in cluster.ENDED:
        return False
    if _age_s(folder) <= PATIENCE_S:
        return True
    return state is not None  # suspended, or hung, or waiting for its next start


def give_up(folder: Path, queue: cluster.Queue) -> Owner | None:
    """Removes an owner that is dead or cannot be checked from here; returns it, or None if there was none.

    Raises Busy if the owner is known to be alive.
    """
    present = read(folder)
    if present is None:
        if _file(folder).exists() and _age_s(folder) <= UNREADABLE_S:
            raise Busy(UNREADABLE)
    elif known_alive(folder, present, queue):
        raise Busy(present)
    _file(folder).unlink(missing_ok=True)
    return present


@contextmanager
def owned(folder: Path, sweep: str | None = None, *, comes_back: Callable[[], bool] = lambda: False) -> Iterator[Owner]:
    """While open, this process owns the run; raises Busy if another process owns it. The folder must exist.

    `comes_back`, asked at the end: this process's job is put back into the queue, and the run waits there for it.
    """
    mine = Owner.this_process("running", sweep)
    take(folder, mine, cluster.Queue())
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, mine, ended), daemon=True)
    beat.start()
    try:
        yield mine
    finally:
        ended.set()
        beat.join()
        if comes_back():
            put(folder, replace(mine, state="queued"))
        else:
            release(folder, mine)


def take(folder: Path, mine: Owner, queue: cluster.Queue) -> None:
    """Makes `mine` the owner; raises Busy if there is a living owner, and waits for one that must end first."""
    until = time.monotonic() + 2 * UNREADABLE_S
    announced = False
    while True:
        if (present := read(folder)) is None and _create(folder, mine, _file(folder)):
            break
        if present is None:
            if (age_s := _age_s(folder)) > UNREADABLE_S:  # damaged, or left half written without hard links
                _file(folder).unlink(missing_ok=True)
            elif time.monotonic() > until:  # somebody of another version touches it
                raise Busy(UNREADABLE)
            elif age_s > SEEN_S and not announced:
                log.info("%s cannot be read; a living owner gets %g s to write it anew", _file(folder), UNREADABLE_S)
                announced = True
            time.sleep(0.05)
            continue
        heir, successor = _is_heir(mine, present), _is_next_start(mine, present)
        if not (heir or successor) and alive(folder, present, queue):
            raise Busy(present)
        # Of all processes that find it dead only one may replace it: the one that creates the file with its token.
        right = folder / f"owner-{present.token}-heir.part"
        if not _create(folder, mine, right):
            _drop_if_left(right)
            time.sleep(0.02)
            continue
        if read(folder) != present:
            right.unlink(missing_ok=True)
            continue
        put(folder, mine)
        if successor:
            _wait_for_the_end_of(present)
        if read(folder) == mine:
            break
    for draft in folder.glob("owner-*.part"):  # the right to it, and what processes left that were killed here
        draft.unlink(missing_ok=True)


def _is_heir(mine: Owner, present: Owner) -> bool:
    """Whether the run waited in the queue for this very job."""
    waits = present.state != "running" and present.sweep is not None
    return waits and mine.state == "running" and present.sweep == mine.sweep and present.job in (None, mine.job)


def _is_next_start(mine: Owner, present: Owner) -> bool:
    """Whether Slurm has restarted the owner's job, and this process is the restart."""
    return (
        present.state == "running"
        and mine.job is not None
        and present.job == mine.job
        and present.restarts < mine.restarts
    )


def _wait_for_the_end_of(former: Owner) -> None:
    """Waits until an earlier start of this job, perhaps on a node that Slurm has lost, has noticed and ended."""
    until = time.monotonic() + PATIENCE_S
    announced = False
    while time.monotonic() < until and (not former.here() or former.process_is_there()):
        if not announced:
            log.info("an earlier start of this job may still be %s; it gets %g s to end", former, PATIENCE_S)
            announced = True
        time.sleep(0.2)


def put(folder: Path, owner: Owner) -> None:
    """Replaces the owner."""
    while True:
        try:
            os.replace(_draft(folder, owner), _file(folder))
            return
        except FileNotFoundError:  # a new owner tidied the draft away
            if not folder.is_dir():
                raise


def release(folder: Path, owner: Owner) -> None:
    """Removes the owner, if it is this one."""
    if (present := read(folder)) is not None and present.token == owner.token:
        _file(folder).unlink(missing_ok=True)


def queued(owner: Owner, job: str, name: str | None) -> Owner:
    """The same claim, now of a job in the queue; a job of this machine is its process."""
    if job.startswith(cluster.LOCAL):
        pid = int(job.removeprefix(cluster.LOCAL))
        return replace(owner, state="queued", job=job, pid=pid, began=cluster.began(pid))
    return replace(owner, state="queued", job=job, cluster=name)


def _beat(folder: Path, mine: Owner, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        try:
            present = read(folder)
            if present is not None and _is_heir(mine, present):
                put(folder, mine)  # the job began before its submitter could write down its id
            elif present is None and _file(folder).exists():
                put(folder, mine)  # damaged: others could not know that the run has an owner
            elif present is not None and present.token != mine.token:
                log.error("%s was taken over: it is %s; this process ends", folder, present)
                os._exit(FENCED)
            os.utime(_file(folder))
        except OSError:  # a server that does not answer, a folder that somebody removed
            continue


def _drop_if_left(right: Path) -> None:
    """Removes the right to a run that a process took and died."""
    heir = _read(right)
    if (heir is not None and heir.here() and not heir.process_is_there()) or _age_s(right) > 2 * PATIENCE_S:
        right.unlink(missing_ok=True)


def _create(folder: Path, owner: Owner, file: Path) -> bool:
    """Writes the file unless there is one."""
    draft = _draft(folder, owner)
    try:
        os.link(draft, file)
        return True
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            return draft.stat().st_nlink == 2  # NFS may do it and lose the answer
        return False
    except FileNotFoundError:  # a new owner tidied the draft away
        if not folder.is_dir():
            raise
        return False
    except OSError:  # a file system without hard links
        try:
            with file.open("x") as new:
                new.write(draft.read_text())
            return True
        except FileExistsError:
            return False
    finally:
        draft.unlink(missing_ok=True)


def _draft(folder: Path, owner: Owner) -> Path:
    draft = folder / f"owner-{owner.token}-{owner.state}.part"
    draft.write_text(json.dumps(asdict(owner)) + "\n")
    return draft


def _file(folder: Path) -> Path:
    return folder / "owner.json"


def _age_s(path: Path) -> float:
    """Seconds since a file, or a run's owner.json, was last touched, by the clock of the file system."""
    file = _file(path) if path.is_dir() else path
    probe = file.parent / f"owner-{uuid4().hex[:12]}-probe.part"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        return now - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
