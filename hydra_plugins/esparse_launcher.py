"""hydra/launcher=a100, ...: how Hydra hands the runs of a sweep to esparse. Hydra looks for launchers here only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class _Submitted(Launcher):
    executor: str

    def __init__(self, **settings: Any) -> None:
        self._settings = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in settings.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._sweep = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """What is submitted are the settings that were composed and checked before, not the overrides."""
        from esparse import session, sweep

        asked = [session.asked[tuple(overrides)] for overrides in job_overrides]
        session.give_away(lambda: sweep.launch(self._sweep, self.executor, self._settings, asked), asked)
        return []


class Slurm(_Submitted):
    executor = "slurm"


class Local(_Submitted):
    executor = "local"
