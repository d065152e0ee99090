"""Puts runs into a queue through submitit; the only file that imports it to submit."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from esparse.cli.attempt import clear
from esparse.cli.earlier import differs
from esparse.errors import Mistake
from esparse.jobs import cluster, lock
from esparse.jobs.launchers import LAUNCHERS, Launcher, Slurm
from esparse.parts.conf_folder import checkout
from esparse.records.report import finished, write_json
from esparse.sweeps.folder import Folder, Run
from esparse.sweeps.node import Job

if TYPE_CHECKING:
    import submitit

# Settings of Slurm's that submitit calls the same.
PASSED_ON = ("partition", "account", "qos", "gres", "constraint", "exclude", "nodelist", "cpus_per_task")
HINTS = {  # what to do about a word of a refusal's; the first that fits
    "array": "a cluster limits an array's tasks: pack more runs into a job, hydra.launcher.runs_per_job=N",
    "generic resource": "no node has what hydra.launcher.gres or gpus_per_node asks for: sinfo -o '%N %G' lists GPUs",
    "node configuration": "no node has so many CPUs, so much memory or such GPUs: sinfo -o '%N %c %m %G' lists them",
    "partition": "sinfo lists them; hydra.launcher.partition",
    "account": "sacctmgr show associations user=$USER lists them; hydra.launcher.account",
}


def launcher_of(sweep: Folder) -> Launcher:
    try:
        return LAUNCHERS[sweep.executor](**sweep.launcher)
    except TypeError:
        raise Mistake(f"{sweep.path} was made by another version of esparse: submit the sweep anew") from None


def submit(sweep: Folder, runs: Iterable[Run]) -> tuple[dict[str, str], dict[str, str]]:
    """Submits the runs that are unfinished and have no owner; returns jobs by run id, and why others are not submitted.

    Raises OSError if the queue refuses; no run stays claimed then.
    """
    launcher = launcher_of(sweep)
    if isinstance(launcher, Slurm) and shutil.which("sbatch") is None:
        raise OSError("there is no sbatch on this machine: submit from a login node, or use hydra/launcher=local")
    left_out: dict[str, str] = {}
    claims: dict[str, lock.Owner] = {}
    queue, chosen = cluster.Queue(), []
    try:
        for run in runs:
            run.folder.mkdir(parents=True, exist_ok=True)
            claim = replace(lock.Owner.this_process("submitting", sweep.path.name), job=None, cluster=None)
            if (record := finished(run.folder)) is not None and not run.settings["rerun"]:
                why = differs(record, run.settings)
                left_out[run.id] = "finished before" if why is None else f"it was run before, {why}"
                continue
            try:
                lock.take(run.folder, claim, queue)
            except lock.Busy as busy:
                left_out[run.id] = str(busy.owner)
                continue
            claims[run.id] = claim
            chosen.append(run)
            if run.settings["rerun"]:
                clear(run.folder)
            # Before the job can begin, and overwrite it.
            status = {"id": run.id, "name": run.name, "sweep": sweep.path.name, "status": "queued"}
            write_json(run.folder / "status.json", status)
        jobs = _to_queue(sweep, launcher, chosen) if chosen else {}
    except BaseException:
        for run in chosen:
            lock.release(run.folder, claims[run.id])
            (run.folder / "status.json").unlink(missing_ok=True)
        raise
    name = cluster.name() if isinstance(launcher, Slurm) else None
    for run in chosen:
        owner = lock.read(run.folder)
        if owner is not None and owner.token == claims[run.id].token:  # else the job began already
            lock.put(run.folder, lock.queued(claims[run.id], jobs[run.id], name))
    return jobs, left_out


def _to_queue(sweep: Folder, launcher: Launcher, runs: Sequence[Run]) -> dict[str, str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    # Neighbours share a job, and with it the measurements of the dense model.
    runs = sorted(runs, key=lambda run: json.dumps([run.settings["model"], run.settings["evaluate"]], sort_keys=True))
    size = launcher.jobs(len(runs))
    chunks = [runs[i : i + size] for i in range(0, len(runs), size)]
    try:
        executor = _executor(sweep, launcher)
        with cluster.outside_of_jobs(keep_slurm=sweep.executor == "local"), executor.batch():
            jobs = [executor.submit(Job(str(sweep.path), tuple(run.id for run in chunk))) for chunk in chunks]
    except (FailedJobError, FailedSubmissionError) as error:
        raise OSError(f"the queue refuses the sweep: {_refusal(error)}") from error
    prefix = cluster.LOCAL if sweep.executor == "local" else ""
    return {run.id: f"{prefix}{job.job_id}" for job, chunk in zip(jobs, chunks, strict=True) for run in chunk}


def _executor(sweep: Folder, launcher: Launcher) -> submitit.Executor:
    import submitit

    logs = sweep.path / "jobs"  # without a folder per job, which Slurm would want before submitit makes it
    logs.mkdir(exist_ok=True)
    setup = list(launcher.setup)
    if (root := checkout()) is not None:  # the checkout that submits is the one that runs
        setup.insert(0, f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}")
    how: dict[str, Any] = {"max_num_timeout": launcher.max_num_timeout, "python": launcher.python}
    given: dict[str, Any] = {"stderr_to_stdout": True, "signal_delay_s": launcher.signal_delay_s}
    given["gpus_per_node"] = launcher.gpus_per_node
    if isinstance(launcher, Slurm):
        executor: submitit.Executor = submitit.SlurmExecutor(logs, **how)
        # srun does not inherit its job's --cpus-per-task (Slurm 22.05 and later).
        given["setup"] = ['export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"', *setup]
        given |= {"job_name": "esparse", "time": launcher.timeout_min, "array_parallelism": launcher.array_parallelism}
        given |= {name: getattr(launcher, name) for name in PASSED_ON}
        given["mem"] = None if launcher.mem_gb is None else f"{round(1024 * launcher.mem_gb)}MB"
        given["srun_args"] = launcher.srun_args or None
        given["additional_parameters"] = {"requeue": True} | launcher.additional_parameters
    else:
        executor = submitit.LocalExecutor(logs, **how)
        # Neither Ctrl-C nor the end of the terminal ends a sweep, and nobody waits for a pipe that its jobs hold open.
        apart = f"exec </dev/null >>{shlex.quote(str(logs / 'processes.log'))} 2>&1"
        given["setup"] = [apart, "trap '' HUP INT", *setup]
        given["timeout_min"] = launcher.timeout_min
    executor.update_parameters(**{name: value for name, value in given.items() if value is not None})
    return executor


def _refusal(error: Exception) -> str:
    message = " ".join(str(getattr(error, "stderr", None) or error).split())
    found = re.search(r"(?:sbatch: )?error: .*", message)
    message = found.group(0) if found else message
    hints = [hint for word, hint in HINTS.items() if word in message.lower()]
    return f"{message} ({hints[0]})" if hints else message
