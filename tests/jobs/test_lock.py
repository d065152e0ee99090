"""One process at a time works on a run: real processes that meet at a folder, and what is decided where none can be."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from esparse.jobs import cluster, lock, run_states
from esparse.jobs.lock import Busy, Owner, alive, owned, read, take

FORK = multiprocessing.get_context("fork")


class Said(cluster.Queue):
    """A queue that knows one answer."""

    def __init__(self, answer: str | None) -> None:
        super().__init__()
        self._answer = answer

    def state(self, job: str, cluster: str | None = None) -> str | None:
        return self._answer


NOBODY = Said(None)


@pytest.fixture(autouse=True)
def in_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_RESTART_COUNT",
        "SUBMITIT_LOCAL_JOB_ID",
        "SUBMITIT_EXECUTOR",
    ):
        monkeypatch.delenv(name, raising=False)


def put(folder: Path, *, age_s: float = 0.0, **changed: object) -> Owner:
    there = replace(Owner.this_process("running"), **changed)
    lock.put(folder, there)
    if age_s:
        os.utime(folder / "owner.json", (time.time() - age_s, time.time() - age_s))
    return there


ELSEWHERE = {"machine": "another", "host": "far"}
DEAD = {"pid": 2**22 + 1}  # no process has this id


def hold(folder: Path, pipe: Connection) -> None:
    with owned(folder):
        pipe.send("mine")
        pipe.poll(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[multiprocessing.Process]:
    """Another process that owns tmp_path."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, there))
    process.start()
    assert here.recv() == "mine"
    yield process  # type: ignore[misc]
    with contextlib.suppress(BrokenPipeError):
        here.send("enough")
    process.join(30)


def test_a_second_process_finds_the_first(holder: multiprocessing.Process, tmp_path: Path) -> None:
    with pytest.raises(Busy, match=rf"running on \S+ \(process {holder.pid}\)"), owned(tmp_path):
        raise AssertionError("two owners")
    state = run_states.state_of(tmp_path, cluster.Queue())
    assert state.kind == "running" and str(holder.pid) in state.text


def test_a_killed_owner_is_taken_over_at_once(holder: multiprocessing.Process, tmp_path: Path) -> None:
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "owner.json").exists()
    with owned(tmp_path) as mine:
        assert read(tmp_path) == mine and mine.pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_owner_is_still_one(holder: multiprocessing.Process, tmp_path: Path) -> None:
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGSTOP)
    os.utime(tmp_path / "owner.json", (0, 0))  # it touches nothing, but its machine knows it
    try:
        with pytest.raises(Busy):
            take(tmp_path, Owner.this_process("running"), NOBODY)
    finally:
        os.kill(holder.pid, signal.SIGCONT)


def contend(folder: Path, start: Event, log: Path) -> None:
    start.wait(30)
    for _ in range(40):
        try:
            with owned(folder):
                with log.open("a") as file:
                    file.write(f"in {os.getpid()}\n")
                time.sleep(0.002)
                with log.open("a") as file:
                    file.write(f"out {os.getpid()}\n")
        except Busy:
            time.sleep(0.001)


def test_many_processes_never_work_at_the_same_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    put(folder, **DEAD)  # they begin by taking over a dead one's
    start = FORK.Event()
    crowd = [FORK.Process(target=contend, args=(folder, start, tmp_path / "log")) for _ in range(6)]
    for process in crowd:
        process.start()
    start.set()
    for process in crowd:
        process.join(60)
        assert process.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) >= 12
    for came, went in zip(lines[::2], lines[1::2], strict=True):
        assert came.replace("in", "out") == went
    assert list(folder.iterdir()) == []


def test_an_owner_that_was_taken_over_ends(tmp_path: Path) -> None:
    code = (
        "import time, sys, pathlib; from esparse.jobs import lock; lock.BEAT_S = 0.05\n"
        "with lock.owned(pathlib.Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    touched = (tmp_path / "owner.json").stat().st_mtime_ns
    while (tmp_path / "owner.json").stat().st_mtime_ns == touched:
        time.sleep(0.01)  # it lives, and says so
    heir = put(tmp_path)
    assert process.wait(30) == lock.FENCED
    process.stdout.close()
    assert read(tmp_path) == heir


@pytest.mark.parametrize(
    ("changed", "age_s", "said", "lives"),
    [
        ({}, 0, None, True),
        ({}, 9999, None, True),  # this very process
        (DEAD, 0, None, False),
        ({"began": 1}, 0, None, False),  # another process has its id by now
        (ELSEWHERE, 30, None, True),
        (ELSEWHERE, 90, None, False),
        (ELSEWHERE | {"job": "7_1"}, 30, "RUNNING", True),
        (ELSEWHERE | {"job": "7_1"}, 30, "GONE", False),  # no need to wait
        (ELSEWHERE | {"job": "7_1"}, 30, "NODE_FAIL", False),
        (ELSEWHERE | {"job": "7_1"}, 90, "SUSPENDED", True),
        (ELSEWHERE | {"job": "7_1"}, 90, "PENDING", True),  # comes back
        (ELSEWHERE | {"job": "7_1"}, 90, None, False),
        (DEAD | {"job": "7_1", "sweep": "s"}, 0, "COMPLETING", True),  # killed, and about to be requeued
        (DEAD | {"job": "7_1", "sweep": "s"}, 0, "FAILED", False),
        (DEAD | {"job": "7_1"}, 0, "RUNNING", False),  # by hand, in an allocation that goes on
        ({"state": "queued", "job": "7_1"} | DEAD, 9999, "PENDING", True),
        ({"state": "queued", "job": "7_1"} | DEAD, 9999, "CANCELLED", False),
        ({"state": "queued", "job": "7_1"} | DEAD, 9999, None, True),  # nobody here can tell
        ({"state": "queued", "job": "local-9"} | DEAD, 0, None, False),
        ({"state": "queued", "job": "local-9"} | ELSEWHERE, 9999, None, True),
        ({"state": "submitting"} | DEAD, 0, None, False),
        ({"state": "submitting"} | ELSEWHERE, 30, None, True),
        ({"state": "submitting"} | ELSEWHERE, 90, None, False),
    ],
)
def test_who_counts_as_alive(
    changed: dict[str, object], age_s: float, said: str | None, lives: bool, tmp_path: Path
) -> None:
    there = put(tmp_path, age_s=age_s, **changed)
    assert alive(tmp_path, there, Said(said)) is lives
    assert [path.name for path in tmp_path.iterdir()] == ["owner.json"]


def job(**changed: object) -> Owner:
    return replace(Owner.this_process("running", "s"), **({"job": "7_1", "token": "new"} | changed))


@pytest.mark.parametrize(
    ("there", "mine", "whose"),
    [
        ({"state": "queued", "sweep": "s", "job": "7_1"}, {}, "mine"),
        ({"state": "submitting", "sweep": "s"}, {}, "mine"),  # begun before its id was noted down
        ({"state": "queued", "sweep": "s", "job": "8_1"}, {}, "theirs"),  # submitted again, as another job
        ({"state": "queued", "sweep": "other", "job": "9"}, {}, "theirs"),
        ({"state": "submitting", "sweep": "s"}, {"state": "submitting", "job": None}, "theirs"),  # two resubmit
        ({"job": "7_1", "sweep": "s"} | DEAD, {"restarts": 1}, "mine"),
        ({"job": "7_1", "sweep": "s"}, {}, "theirs"),  # the same start of the same job
    ],
)
def test_a_job_takes_the_run_that_waits_for_it(
    there: dict[str, object], mine: dict[str, object], whose: str, tmp_path: Path
) -> None:
    put(tmp_path, **there)
    me = job(**mine)
    if whose == "theirs":
        with pytest.raises(Busy):
            take(tmp_path, me, Said("PENDING"))
    else:
        take(tmp_path, me, Said("PENDING"))
        assert read(tmp_path) == me


def test_the_next_start_of_a_job_gives_the_lost_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    put(tmp_path, job="7_1", sweep="s", **ELSEWHERE)
    begun = time.monotonic()
    take(tmp_path, job(restarts=1), Said("RUNNING"))
    assert time.monotonic() - begun >= 0.3


@pytest.mark.parametrize(
    "text",
    [
        '{"half',
        "",
        "[]",
        "7",
        '{"state": "running", "host": "far", "machine": "m", "pid": "many", "began": null}',
        '{"state": "queued", "host": "far", "machine": "m", "pid": 1, "began": null, "job": 4711}',
        "[" * 100_000,
    ],
    ids=["half", "empty", "list", "number", "words for numbers", "numbers for words", "deep"],
)
def test_a_file_that_is_no_owner_is_waited_for_and_then_replaced(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "UNREADABLE_S", 0.2)
    (tmp_path / "owner.json").write_text(text)
    take(tmp_path, mine := Owner.this_process("running"), NOBODY)
    assert read(tmp_path) == mine


def test_a_damaged_file_costs_seconds_and_a_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="esparse")
    (tmp_path / "owner.json").write_text("")
    touched = time.time() - 13  # no living owner touches it: it does so every 5 s
    os.utime(tmp_path / "owner.json", (touched, touched))
    begun = time.monotonic()
    take(tmp_path, Owner.this_process("running"), NOBODY)
    assert time.monotonic() - begun < 10
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'owner.json'} cannot be read; a living owner gets 15 s to write it anew"
    ]


def test_a_living_owner_mends_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with owned(tmp_path) as mine:
        (tmp_path / "owner.json").write_text("")
        until = time.monotonic() + 10
        while read(tmp_path) is None and time.monotonic() < until:
            time.sleep(0.02)
        assert read(tmp_path) == mine


def test_an_owner_of_a_newer_version_is_one(tmp_path: Path) -> None:
    there = put(tmp_path)
    newer = json.loads((tmp_path / "owner.json").read_text()) | {"field_of_later": 1}
    (tmp_path / "owner.json").write_text(json.dumps(newer))
    assert read(tmp_path) == there
    with pytest.raises(Busy):
        take(tmp_path, Owner.this_process("running"), NOBODY)


def test_a_living_owner_that_cannot_be_read_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner.json").write_text('{"of": "another world"}')
    monkeypatch.setattr(lock, "UNREADABLE_S", 0.2)
    monkeypatch.setattr(lock, "_age_s", lambda path: 0.0)  # somebody touches it
    with pytest.raises(Busy, match="does not name"):
        take(tmp_path, Owner.this_process("running"), NOBODY)
    with pytest.raises(Busy):
        lock.give_up(tmp_path, NOBODY)


def test_clocks_of_two_machines_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tmp_path / "owner-x-heir.part"
    right.write_text(json.dumps(asdict(replace(Owner.this_process("running"), machine="another"))))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    lock._drop_if_left(right)
    assert right.exists()
    os.utime(right, (now - 1000, now - 1000))
    lock._drop_if_left(right)
    assert not right.exists()


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "5"}, "5"),
        ({"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}, "77_3"),
        ({"SLURM_JOB_ID": "5", "SUBMITIT_LOCAL_JOB_ID": "9", "SUBMITIT_EXECUTOR": "local"}, "local-9"),
        ({"SLURM_JOB_ID": "5", "SUBMITIT_LOCAL_JOB_ID": "9", "SUBMITIT_EXECUTOR": "slurm"}, "5"),
    ],
)
def test_the_job_of_this_process(variables: dict[str, str], job: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "/nowhere")
    cluster._is_of_array.cache_clear()
    assert cluster.own_job() == job
    mine = Owner.this_process("running")
    assert (mine.job, mine.cluster) == (job, None)


@pytest.mark.parametrize("array", [True, False])
def test_a_job_that_an_array_task_submitted_is_no_task(
    array: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "90", "ARRAY_JOB_ID": "77", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    said = "JobId=90 ArrayJobId=77 ArrayTaskId=3 JobName=x" if array else "JobId=90 JobName=x"
    fake(tmp_path, "scontrol", f"echo '{said}'", monkeypatch)
    cluster._is_of_array.cache_clear()
    assert cluster.own_job() == ("77_3" if array else "90")


def test_what_is_submitted_gets_a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_CONF", "SUBMITIT_LOCAL_JOB_ID", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "7")
    with cluster.outside_of_jobs(keep_slurm=False):
        assert {"SLURM_CONF", "SBATCH_ACCOUNT"} == {
            key for key in os.environ if key.startswith(("SLURM", "SUB", "SBA"))
        }
    with cluster.outside_of_jobs(keep_slurm=True):
        assert "SLURM_JOB_ID" in os.environ and "SUBMITIT_LOCAL_JOB_ID" not in os.environ
    assert os.environ["SUBMITIT_LOCAL_JOB_ID"] == "7"


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    with owned(tmp_path) as mine, pytest.raises(Busy):
        assert read(tmp_path) == mine
        take(tmp_path, Owner.this_process("running"), NOBODY)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_comes_back_keeps_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with owned(tmp_path, "s", comes_back=lambda: True):
        pass
    there = read(tmp_path)
    assert there is not None and (there.state, there.job, there.sweep) == ("queued", "7", "s")


def fake(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    cluster.name.cache_clear()


def test_what_squeue_and_sacct_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin = tmp_path / "bin"
    fake(bin, "squeue", "echo x >> $0.log; echo '7_0|RUNNING|None'; echo '7_1|PENDING|Priority'", monkeypatch)
    queue = cluster.Queue()
    assert [queue.state(f"7_{i}") for i in range(3)] == ["RUNNING", "PENDING", "GONE"]
    assert (queue.why("7_0"), queue.why("7_1")) == ("", "Priority")
    assert (bin / "squeue.log").read_text() == "x\n"  # one question for the array
    fake(bin, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", monkeypatch)
    assert cluster.Queue().state("7_0") == "GONE"
    fake(bin, "sacct", "echo '7_0|CANCELLED by 1000'", monkeypatch)
    assert cluster.Queue().state("7_0") == "CANCELLED"
    fake(bin, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1", monkeypatch)
    assert cluster.Queue().state("7_0") is None
    fake(bin, "scontrol", "echo 'ClusterName             = here'", monkeypatch)
    fake(bin, "squeue", "echo '7_0|RUNNING|None'", monkeypatch)
    assert cluster.Queue().state("7_0", "here") == "RUNNING"
    assert cluster.Queue().state("7_0", "there") is None  # another cluster's job of that id
    monkeypatch.setenv("PATH", "/nowhere")
    cluster.name.cache_clear()
    assert cluster.Queue().state("7_0") is None
    cluster.name.cache_clear()


@pytest.mark.parametrize(
    ("status", "there", "said", "expected"),
    [
        ({}, None, None, ("never started", "never started")),
        ({"status": "failed", "reason": "no room"}, None, None, ("failed", "no room")),
        ({"status": "cancelled"}, None, None, ("cancelled", "cancelled")),
        ({"status": "running", "host": "n1", "job": "7_1"}, None, "NODE_FAIL", ("died", "7_1: NODE_FAIL")),
        ({"status": "running", "host": "n1", "job": None}, DEAD, None, ("died", "died while running on ")),
        ({"status": "queued"}, {"state": "queued", "job": "7_1"}, "OUT_OF_MEMORY", ("died", "7_1: OUT_OF_MEMORY")),
        ({"status": "preempted"}, {"state": "queued", "job": "7_1"}, "PENDING", ("queued", "preempted before, queued")),
        ({"status": "running"}, {"job": "7_1", "sweep": "s"}, "RUNNING", ("running", "job 7_1")),
    ],
)
def test_how_a_run_stands(
    status: dict[str, object],
    there: dict[str, object] | None,
    said: str | None,
    expected: tuple[str, str],
    tmp_path: Path,
) -> None:
    if status:
        (tmp_path / "status.json").write_text(json.dumps(status))
    if there is not None:
        put(tmp_path, **there)
    state = run_states.state_of(tmp_path, Said(said))
    assert state.kind == expected[0]
    assert expected[1] in state.text
