"""Sweeps on a real Slurm of two nodes: what is submitted once, ends once, whatever happens to its jobs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esparse.jobs import cluster, lock
from tests.slurm.lab import Lab
from tests.workshop import ROOT, furnished, small_run

pytestmark = pytest.mark.slurm
PATIENT_S = 400  # nothing here is measured by the clock: a busy machine may take its time
# A run of seconds, with many blocks to be stopped between: it may be done sooner than Slurm has killed it (`frozen`).
LONG = ["calibration.sequences=512", "calibration.length=64", "snapshot_seconds=0", "update=obs"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "deep").mkdir()
    furnished(folder / "deep", blocks=24)
    return furnished(folder, blocks=2)


@pytest.fixture(autouse=True)
def in_the_lab(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in lab.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lab.wait_for_nodes(lab.nodes)


def started(command: list[str], **launcher: object) -> subprocess.Popen[str]:
    settings = {"cpus_per_task": 1, "mem_gb": 1} | launcher
    words = [*command, "hydra/launcher=site", *(f"hydra.launcher.{k}={v}" for k, v in settings.items())]
    whole = [sys.executable, str(ROOT / "launch.py"), "-m", *words]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENT_S)
    return process.returncode, out, err


def launched(command: list[str], **launcher: object) -> tuple[int, str, str]:
    return ended(started(command, **launcher))


def asked(*words: str) -> tuple[int, str]:
    """What `python -m esparse.sweep` says, from another folder."""
    command = [sys.executable, "-m", "esparse.sweep", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENT_S, cwd="/", env=_env())
    return done.returncode, done.stdout + done.stderr


def _env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def sweeps(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("sweeps/*/sweep.json"))


def records(out: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")}


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENT_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def beginnings(folder: Path) -> int:
    return (folder / "run.log").read_text().count(f"-> {folder}")


@pytest.fixture(scope="module")
def undisturbed(workshop: Path) -> dict[str, bytes]:
    """The files of a deep run that nothing happened to."""
    out = workshop / "undisturbed"
    command = [sys.executable, str(ROOT / "launch.py"), *small_run(workshop / "deep", out), *LONG]
    assert subprocess.run(command, timeout=PATIENT_S).returncode == 0
    return {path.name: path.read_bytes() for path in out.glob("*/*.safetensors")}


def submitted_deep_run(workshop: Path, out: Path, *more: str, **launcher: object) -> tuple[Path, Path]:
    """A deep run that has begun its third block or a later one; the sweep's folder and the run's."""
    code, _, said = launched([*small_run(workshop / "deep", out), *LONG, *more], wait="false", **launcher)
    assert code == 0, said
    (sweep,) = sweeps(out)
    assert f"python -m esparse.sweep status|wait|cancel {sweep}" in said
    (folder,) = (path.parent for path in out.glob("*/status.json"))
    until((folder / "blocks" / "done-00001.safetensors").exists)  # whole, not a draft
    assert not (folder / "result.json").exists()
    return sweep, folder


def frozen(folder: Path) -> lock.Owner:
    """Stops the run in the folder until it is killed: Slurm wakes up what it signals, and kills it seconds later."""
    there = lock.read(folder)
    assert there is not None

    def again_and_again() -> None:
        while cluster.began(there.pid) == there.began:
            with contextlib.suppress(ProcessLookupError):
                os.kill(there.pid, signal.SIGSTOP)
            time.sleep(0.01)

    os.kill(there.pid, signal.SIGSTOP)
    threading.Thread(target=again_and_again, daemon=True).start()
    return there


def resumed_as_if_nothing_had_happened(sweep: Path, folder: Path, undisturbed: dict[str, bytes]) -> None:
    code, said = asked("wait", str(sweep))
    assert code == 0, said
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == undisturbed
    record = json.loads((folder / "result.json").read_text())
    assert record["resumed"] and record["resumed"][0] >= 2
    assert not list(folder.glob("owner*")) and not (folder / "blocks").exists()
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"


def test_a_sweep_of_six_with_one_that_fails(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(workshop / "model", tmp_path / "whole" / "model")
    (tmp_path / "broken").mkdir()
    shutil.copytree(workshop / "model", tmp_path / "broken" / "model")
    lost = sorted((tmp_path / "broken" / "model").glob("*.safetensors"))[0]
    lost.rename(tmp_path / lost.name)
    paths = f"model.path={tmp_path}/whole/model,{tmp_path}/broken/model"
    command = [*small_run(workshop, out), "metric=magnitude,wanda,entropy", "shuffle=none", paths]
    command.remove(f"model.path={workshop / 'model'}")
    code, table, said = launched(command, runs_per_job=3)
    assert code == 1
    assert "6 runs submitted as job" in said
    assert "6 runs: 3 finished, 3 failed" in said
    (sweep,) = sweeps(out)
    for line in (f"logs: {sweep / 'jobs'}", f"records: {out}"):
        assert line in said
    assert table.count(lost.name) >= 3  # the reason stands in the table
    assert len(records(out)) == 3
    failed = [json.loads(p.read_text()) for p in out.glob("*/status.json") if "failed" in p.read_text()]
    assert len(failed) == 3
    for status in failed:
        assert lost.name in status["reason"] and "Traceback" in status["traceback"]
        assert status["host"] and status["job"]
    # Three runs of one model share a job, and what was measured of the dense one.
    assert len({record["quality"]["text.txt"]["dense_run"] for record in records(out).values()}) == 1
    assert len(list((sweep / "jobs").glob("*_log.out"))) == 2

    def states() -> set[str]:
        shown = [slurm("scontrol", "-o", "show", "job", status["job"]) for status in failed]
        return {text.split("JobState=")[1].split()[0] for text in shown}

    until(lambda: states() == {"FAILED"})  # a job ends a moment after its last run

    code, shown = asked("status", str(sweep))
    assert code == 1 and "3 finished, 3 failed" in shown and lost.name in shown
    code, shown = asked("resubmit", "--failed", str(sweep), "runs_per_jobb=2")
    assert code == 2 and "runs_per_jobb" in shown
    (tmp_path / lost.name).rename(lost)
    before = {i: (out / i / "result.json").stat().st_mtime_ns for i in records(out)}
    code, shown = asked("resubmit", "--failed", str(sweep))
    assert code == 0 and "3 runs submitted" in shown, shown
    code, shown = asked("resubmit", str(sweep))
    assert code == 0 and "nothing to submit" in shown, shown
    code, shown = asked("wait", str(sweep))
    assert code == 0 and "6 runs: 6 finished" in shown, shown
    assert len(records(out)) == 6
    assert all((out / i / "result.json").stat().st_mtime_ns == at for i, at in before.items())
    code, _, said = launched(command)
    assert code == 0 and said.count("is not submitted: finished before") == 6 and "submitted as job" not in said


def test_requeued_by_slurm_in_the_middle_of_a_block(
    workshop: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Slurm kills the job and begins it anew, without a word to it."""
    sweep, folder = submitted_deep_run(workshop, tmp_path / "out")
    there = frozen(folder)
    assert there.state == "running" and there.job is not None
    slurm("scontrol", "requeue", there.job)
    resumed_as_if_nothing_had_happened(sweep, folder, undisturbed)
    assert beginnings(folder) == 2


def test_stopped_by_the_signal_of_its_time_limit(workshop: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """The signal that Slurm sends `signal_delay_s` before the limit; submitit counts it as the limit in a short job."""
    sweep, folder = submitted_deep_run(workshop, tmp_path / "out", timeout_min=9)
    there = lock.read(folder)
    assert there is not None and there.job is not None
    slurm("scancel", "--signal=USR2", there.job)
    until(lambda: json.loads((folder / "status.json").read_text())["status"] == "preempted")
    code, shown = asked("status", str(sweep))
    assert code == 0 and ("1 queued" in shown or "1 running" in shown or "1 finished" in shown), shown
    resumed_as_if_nothing_had_happened(sweep, folder, undisturbed)
    assert "preempted: the next attempt goes on behind the last finished block" in (folder / "run.log").read_text()
    assert "timed-out" in "".join(log.read_text() for log in (sweep / "jobs").glob("*_log.out"))


def stopped_until_slurm_ends_it(folder: Path) -> None:
    """A run that is not done before its time limit, which is a minute at least; Slurm wakes up what it signals."""
    there = lock.read(folder)
    assert there is not None
    os.kill(there.pid, signal.SIGSTOP)
    until(lambda: cluster.began(there.pid) is None)


def test_told_before_its_time_limit(workshop: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    sweep, folder = submitted_deep_run(workshop, tmp_path / "out", timeout_min=1, signal_delay_s=5)
    stopped_until_slurm_ends_it(folder)
    assert "preempted: the next attempt goes on behind the last finished block" in (folder / "run.log").read_text()
    assert "timed-out" in "".join(log.read_text() for log in (sweep / "jobs").glob("*_log.out"))
    resumed_as_if_nothing_had_happened(sweep, folder, undisturbed)


def test_killed_at_its_time_limit(workshop: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Nothing was said before, or not early enough; Slurm does not put such a job back into its queue."""
    sweep, folder = submitted_deep_run(workshop, tmp_path / "out", timeout_min=1, signal_delay_s=0)
    killed = frozen(folder)
    until(lambda: cluster.began(killed.pid) is None)
    until(lambda: "1 died" in asked("status", str(sweep))[1])
    code, shown = asked("status", str(sweep))
    assert code == 1 and "died while running on" in shown and "TIMEOUT" in shown, shown
    code, shown = asked("resubmit", "--failed", str(sweep))
    assert code == 0 and "1 runs submitted" in shown, shown
    resumed_as_if_nothing_had_happened(sweep, folder, undisturbed)


def test_a_node_that_is_lost_while_its_job_goes_on(
    lab: Lab, workshop: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Cut off from Slurm, the first start still writes to the run's folder when the second one begins elsewhere."""
    sweep, folder = submitted_deep_run(workshop, tmp_path / "out")
    first = lock.read(folder)
    assert first is not None and first.job is not None
    node = slurm("squeue", "-h", "-j", first.job, "-o", "%N").strip()
    os.kill(first.pid, signal.SIGSTOP)  # so that it is not done before
    lab.stop_node(node)
    try:
        until(lambda: (now := lock.read(folder)) is not None and now.token != first.token)
        os.kill(first.pid, signal.SIGCONT)
        until(lambda: cluster.began(first.pid) is None)
        resumed_as_if_nothing_had_happened(sweep, folder, undisturbed)
    finally:
        lab.start_node(node)
    assert "was taken over" in (folder / "run.log").read_text()
    (log,) = (sweep / "jobs").glob("*_log.out")
    assert "an earlier start of this job may still be running" in log.read_text()


def test_two_sweeps_at_once(workshop: Path, tmp_path: Path) -> None:
    """Each run is submitted by one of them, and both wait for all."""
    out = tmp_path / "out"
    same = [*small_run(workshop, out), "shuffle=none", "seed=1,2"]
    both = [started([*same, "metric=wanda,magnitude"], runs_per_job=2) for _ in range(2)]
    ends = [ended(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert len(sweeps(out)) == 2 and len(records(out)) == 4
    assert sum(said.count("is not submitted: ") for _, _, said in ends) == 4
    assert [beginnings(out / run) for run in records(out)] == [1, 1, 1, 1]
    assert ends[0][1] == ends[1][1] and ends[0][1].count("magnitude") == 2  # the same table


def test_cancelled_and_submitted_again(lab: Lab, workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep, folder = submitted_deep_run(workshop, out)
    frozen(folder)
    plain = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *small_run(workshop / "deep", out), *LONG],
        capture_output=True,
        text=True,
        timeout=PATIENT_S,
    )
    assert plain.returncode == 1 and "and is not run twice" in plain.stderr  # a run by hand beside the job
    code, said = asked("cancel", str(sweep))
    assert code == 0 and "1 runs cancelled" in said, said
    code, said = asked("status", str(sweep))
    assert code == 1 and "1 cancelled" in said, said
    assert not list(folder.glob("owner*"))
    code, said = asked("resubmit", "--failed", str(sweep))
    assert code == 0 and "nothing to submit" in said
    code, said = asked("resubmit", str(sweep), "timeout_min=30")
    assert code == 0 and "1 runs submitted" in said
    job = lock.read(folder)
    assert job is not None and job.job is not None
    assert "TimeLimit=00:30:00" in slurm("scontrol", "-o", "show", "job", job.job)
    code, said = asked("wait", str(sweep))
    assert code == 0 and len(records(out)) == 1, said


def test_what_slurm_refuses_is_one_sentence_and_nothing_is_claimed(workshop: Path, tmp_path: Path) -> None:
    command = [*small_run(workshop, tmp_path / "out"), "seed=1,2"]
    code, _, said = launched(command, partition="nowhere")
    assert code == 1 and "esparse: the queue refuses the sweep" in said and "partition" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("*/owner*")) and not list((tmp_path / "out").glob("*/status.json"))
    code, _, said = launched(command, timeout_min=0)
    assert code == 2 and "hydra.launcher.timeout_min must be at least 1" in said and "Traceback" not in said
