"""A sweep in the queue of this machine (hydra/launcher=local), looked at and changed from other processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose

from esparse.cli import registry
from esparse.jobs import cluster, lock
from esparse.jobs.launchers import LAUNCHERS, Local, Slurm
from esparse.sweeps import commands
from esparse.sweeps.folder import Folder
from tests import forks
from tests.composing import composing
from tests.workshop import ROOT, furnished, launch, small_run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "deep").mkdir()
    furnished(folder / "deep", blocks=12)
    return furnished(folder, blocks=2)


def asked(*words: str) -> tuple[int, str]:
    """What `python -m esparse.sweep` says, from another folder."""
    done = forks.run("-m", "esparse.sweep", *words, cwd=Path("/"))
    return done.returncode, done.stdout + done.stderr


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def test_a_sweep_that_is_not_waited_for(workshop: Path, tmp_path: Path) -> None:
    """One process with two runs, of which the second one fails."""
    (tmp_path / "short.txt").write_text("Too short.")
    same = [*small_run(workshop, tmp_path / "out"), "metric=wanda", "hydra/launcher=local"]
    same.remove(f"calibration.path={workshop / 'text.txt'}")
    paths = f"calibration.path={workshop / 'text.txt'},{tmp_path / 'short.txt'}"
    one_process = ["hydra.launcher.wait=false", "hydra.launcher.array_parallelism=1"]
    done = launch("-m", *same, paths, *one_process, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "out").glob("sweeps/*")
    assert f"not waited for: python -m esparse.sweep status|wait|cancel {folder}" in done.stderr
    code, said = asked("wait", str(folder))
    assert code == 1 and "2 runs: 1 finished, 1 failed" in said
    code, said = asked("status", str(folder))
    assert code == 1 and said.count("  finished: in ") == 1 and said.count("too few for one sequence of 16") == 1, said


@pytest.mark.slow
def test_a_sweep_in_two_processes_is_found_elsewhere_and_resubmitted(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    same = [*small_run(workshop, out), "shuffle=none", "tracking=wandb", "hydra/launcher=local"]
    same.remove("tracking=none")
    (tmp_path / "later.txt").write_text("Too short.")
    paths = f"calibration.path={workshop / 'text.txt'},{tmp_path / 'later.txt'}"
    same.remove(f"calibration.path={workshop / 'text.txt'}")
    done = launch("-m", *same, "metric=wanda,magnitude", paths, "hydra.launcher.wait=false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = out.glob("sweeps/*")
    assert f"not waited for: python -m esparse.sweep status|wait|cancel {folder}" in done.stderr
    assert "4 runs submitted as job local-" in done.stderr
    moved = tmp_path / "elsewhere"  # as another machine may mount it
    moved.symlink_to(out)
    there = moved / "sweeps" / folder.name
    code, said = asked("wait", str(there))
    assert code == 1 and "4 runs: 2 finished, 2 failed" in said
    assert "too few for one sequence" in " ".join(said.split())  # in the table
    assert f"xargs -d '\\n' wandb sync < {there / 'wandb-runs.txt'}" in said
    listed = [Path(line) for line in (there / "wandb-runs.txt").read_text().splitlines()]
    assert len(listed) == 2
    for run in listed:  # the sweep is their group
        (file,) = run.glob("*.wandb")
        assert folder.name.encode() in file.read_bytes()
    code, said = asked("status", str(there))
    assert code == 1 and said.count("  finished: in ") == 2 and said.count("too few for one sequence of 16") == 2, said
    code, said = asked("status", str(moved))
    assert code == 2 and str(there) in said  # told where the sweep is
    failed = [json.loads(p.read_text()) for p in out.glob("*/status.json")]
    assert sum("traceback" in status and "Traceback" in status["traceback"] for status in failed) == 2
    # Two processes with two runs each: the second one's model is the first one's, as it was loaded.
    assert sum("is as it was loaded for an earlier run" in p.read_text() for p in out.glob("*/run.log")) == 2
    shutil.copy(workshop / "text.txt", tmp_path / "later.txt")
    code, said = asked("resubmit", "--failed", str(there))
    assert code == 0 and "2 runs submitted" in said, said
    code, said = asked("wait", str(there))
    assert code == 0 and "4 runs: 4 finished" in said, said


@pytest.mark.slow
def test_killed_cancelled_and_run_by_hand(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*small_run(workshop / "deep", out), "update=obs"]
    done = launch("-m", *command, "seed=1,2", "hydra/launcher=local", "hydra.launcher.wait=false")
    assert done.returncode == 0, done.stderr
    (folder,) = out.glob("sweeps/*")
    one, two = (run.folder for run in Folder.read(folder).runs)
    pids: dict[Path, int] = {}

    def stopped() -> bool:  # each as soon as it is at work, so that it does not end by itself
        for run in (one, two):
            now = lock.read(run)
            if run not in pids and now is not None and now.state == "running":
                os.kill(now.pid, signal.SIGSTOP)
                pids[run] = now.pid
        return len(pids) == 2

    until(stopped)
    again = launch("-m", *command, "seed=1,2")
    assert again.returncode == 1 and again.stderr.count("and is not run twice") == 2
    said = " ".join(again.stdout.split())  # in the table
    assert said.count("not finished: running on") == 2 and "failed" not in said, again.stdout
    assert all(f"(process {pid}, job local-" in said for pid in pids.values())
    os.kill(pids[one], signal.SIGKILL)
    until(lambda: cluster.began(pids[one]) is None)
    code, said = asked("status", str(folder))
    assert code == 1 and "died: died while running on" in said
    code, said = asked("cancel", str(folder))
    assert code == 0 and "1 runs cancelled" in said, said
    assert cluster.began(pids[two]) is None
    code, said = asked("status", str(folder))
    assert "1 died, 1 cancelled" in said and not (two / "owner.json").exists()
    code, said = asked("resubmit", str(folder))
    assert code == 0 and "2 runs submitted" in said
    code, said = asked("wait", str(folder))
    assert code == 0 and "2 runs: 2 finished" in said


@pytest.mark.slow
def test_inside_of_a_job_of_slurms(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an allocation (salloc, a notebook on a node), or in a task of an array."""
    for name, value in {"JOB_ID": "4711", "ARRAY_JOB_ID": "77", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    done = launch("-m", *small_run(workshop, tmp_path / "out"), "metric=wanda,magnitude", "hydra/launcher=local")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("out/*/result.json"))) == 2


def test_a_run_that_nobody_has_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "1a2b3c4d"
    assert commands.main(["release", str(run)]) == 2
    run.mkdir()
    (run / "status.json").write_text('{"status": "queued"}')
    there = lock.Owner.this_process("queued")
    lock.put(run, replace(there, job="8123_4", cluster="elsewhere", machine="another", pid=1))
    with pytest.raises(lock.Busy) as busy, lock.owned(run):
        pass
    assert f"python -m esparse.sweep release {run}" in busy.value.way_out(run)
    assert commands.main(["release", str(run)]) == 0
    assert "it was queued (job 8123_4)" in capsys.readouterr().out
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
    with lock.owned(run):
        assert commands.main(["release", str(run)]) == 1
        assert "is not given up: it is running on" in capsys.readouterr().err
    assert commands.main(["release", str(run)]) == 0


@pytest.mark.slow
def test_plans_are_made_here(tmp_path: Path) -> None:
    done = launch("-m", "dry_run=true", "pattern=2:4,4:8", "hydra/launcher=site", f"output_root={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2:4") + done.stdout.count("4:8") >= 2
    assert not list(tmp_path.glob("out/*/status.json"))


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["hydra.launcher.partitionn=x"], 2, "partitionn"),
        (["hydra.launcher.timeout_min=soon"], 2, "hydra.launcher.timeout_min takes a whole number, got 'soon'"),
        (["hydra.launcher.runs_per_job=0"], 2, "hydra.launcher.runs_per_job must be at least 1"),
        (["hydra.launcher.signal_delay_s=99999"], 2, "is the whole time limit of 240 min"),
        ([], 2, "there is no sbatch on this machine"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = launch("-m", "hydra/launcher=site", "seed=1,2", f"output_root={tmp_path / 'out'}", *words)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*/status.json"))


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_a_sweep(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["status", str(tmp_path / folder)]) == 2
    assert "has no sweep.json" in capsys.readouterr().err


def composed(*overrides: str) -> tuple[dict, registry.Experiment]:
    config = compose("config", list(overrides), return_hydra_config=True)
    experiment = registry.build(config)
    return registry.resolved(config, experiment, config.hydra.runtime.choices), experiment


def test_settings_of_another_version_are_refused() -> None:
    with composing():
        settings, _ = composed()
    settings["metric"]["forgotten"] = 1
    with pytest.raises(ValueError, match="another version of esparse"):
        registry.rebuilt(settings)


def test_every_launcher_composes_and_documents_every_setting() -> None:
    registry.register()
    options = sorted((ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
    assert {path.stem for path in options} == {"site", "a100", "h100", "debug", "local"}
    for path in options:
        with composing():
            config = compose("config", [f"hydra/launcher={path.stem}"], return_hydra_config=True)
        settings = {name: value for name, value in config.hydra.launcher.items() if name != "_target_"}
        kind = LAUNCHERS["local" if path.stem == "local" else "slurm"]
        assert kind(**settings)
        if path.stem in ("site", "local"):
            text = path.read_text()
            assert all(
                f"\n{name}: " in text and "#" in text.split(f"\n{name}: ")[1].split("\n")[0] for name in settings
            )
    assert (Slurm, Local) == tuple(LAUNCHERS.values())


def test_local_jobs_are_no_more_than_asked_for() -> None:
    with composing():
        config = compose("config", ["hydra/launcher=local"], return_hydra_config=True)
    local = Local(**{n: v for n, v in config.hydra.launcher.items() if n != "_target_"} | {"array_parallelism": 3})
    assert [local.jobs(runs) for runs in (1, 3, 4, 7, 9)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("sbatch: error: Invalid generic resource (gres) specification", "sinfo -o '%N %G' lists GPUs"),
        ("sbatch: error: invalid partition specified: nowhere", "sinfo lists them; hydra.launcher.partition"),
        ("sbatch: error: Requested node configuration is not available", "sinfo -o '%N %c %m %G' lists them"),
        ("noise\nsbatch: error: Batch job submission failed: Invalid job array specification", "runs_per_job=N"),
        ("sbatch: error: Unable to contact slurm controller", None),
    ],
)
def test_a_refusal_of_the_queue_says_what_to_do(said: str, hint: str | None) -> None:
    from esparse.sweeps.submission import _refusal

    message = _refusal(OSError(said))
    assert message.startswith("sbatch: error: ") and "noise" not in message
    assert (message.endswith(")") and hint in message) if hint else "(" not in message
