"""The settings of hydra/launcher=...: what one job of a sweep gets. Values and units stand in conf/hydra/launcher/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esparse.errors import Mistake


@dataclass(kw_only=True, slots=True)
class Launcher:
    """A sweep's runs as jobs. ValueError for a setting that makes no sense."""

    wait: bool  # until all runs have ended, then print their table; false: return once they are in the queue
    runs_per_job: int  # runs that share an allocation and a process, one after the other
    array_parallelism: int  # jobs at a time
    timeout_min: int  # minutes of a job; what is not done by then goes on in its next start
    signal_delay_s: int  # seconds before the time limit at which a job is told
    max_num_timeout: int  # how often a job that reached its time limit is put back into the queue
    setup: list[str]  # shell lines in front of every job: module load, source, export
    python: str | None  # what starts Python on the node, e.g. in a container; null: the Python that submits
    gpus_per_node: int | None

    def __post_init__(self) -> None:
        for name in ("runs_per_job", "array_parallelism", "timeout_min"):
            if getattr(self, name) < 1:
                raise Mistake(f"hydra.launcher.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("signal_delay_s", "max_num_timeout"):
            if getattr(self, name) < 0:
                raise Mistake(f"hydra.launcher.{name} must not be negative, got {getattr(self, name)}")
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise Mistake(
                f"hydra.launcher.signal_delay_s={self.signal_delay_s} is the whole time limit of {self.timeout_min} min"
            )

    def jobs(self, runs: int) -> int:
        """How many runs one job gets."""
        return self.runs_per_job


@dataclass(kw_only=True, slots=True)
class Local(Launcher):
    """Processes of this machine, which outlive the terminal."""

    _target_: str = "hydra_plugins.esparse_launcher.Local"

    def jobs(self, runs: int) -> int:
        """There is no queue: what exceeds the jobs at a time goes into the same ones."""
        return max(self.runs_per_job, -(-runs // self.array_parallelism))


@dataclass(kw_only=True, slots=True)
class Slurm(Launcher):
    """One job array; null leaves a setting to the cluster."""

    _target_: str = "hydra_plugins.esparse_launcher.Slurm"

    partition: str | None
    account: str | None
    qos: str | None
    gres: str | None  # e.g. gpu:a100:1, where gpus_per_node alone does not say which
    constraint: str | None  # features of nodes, e.g. a100-80gb
    exclude: str | None  # nodes
    nodelist: str | None
    cpus_per_task: int | None
    mem_gb: float | None  # GB of host memory per node
    srun_args: list[str]  # e.g. --container-image=/images/esparse.sqsh (pyxis)
    additional_parameters: dict[str, Any]  # other #SBATCH lines: {mail-type: FAIL}


LAUNCHERS: dict[str, type[Launcher]] = {"slurm": Slurm, "local": Local}
