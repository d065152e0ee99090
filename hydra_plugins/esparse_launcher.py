"""How Hydra hands the runs of a sweep to esparse: to a queue (hydra/launcher=a100, ...), or to this process.

Hydra looks for sweepers and launchers here only. A run's settings are composed once, by the check of the whole sweep
before its first run (esparse/cli/sweep_check.py); Hydra's own sweeper and launcher would do it twice more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, env_override
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class Sweeper(BasicSweeper):
    """Hydra's own, for runs that are composed already."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if isinstance(self.launcher, BasicLauncher):
            self.launcher = _Here()
            self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Composes only what the check could not: Hydra says why."""
        from esparse.cli.call import call

        super().validate_batch_is_legal([overrides for overrides in batch if tuple(overrides) not in call.runs])


class _Here(Launcher):
    """One run after the other in this process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._variables = config.hydra.job.env_set

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from esparse.cli.attempt import carry_out_all
        from esparse.cli.call import call

        with env_override(self._variables):
            carry_out_all([call.runs[tuple(overrides)] for overrides in job_overrides])
        return []


class _Submitted(Launcher):
    executor: str

    def __init__(self, **settings: Any) -> None:
        self._settings = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in settings.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._sweep = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """What is submitted are the settings that were composed and checked before, not the overrides."""
        from esparse.cli.call import call
        from esparse.cli.sweep_check import give_away
        from esparse.parts import extras
        from esparse.sweeps import commands

        asked = [call.runs[tuple(overrides)] for overrides in job_overrides]

        def submit() -> bool:
            extras.need("submitit", f"a sweep in a queue ({self.executor})")
            return commands.launch(self._sweep, self.executor, self._settings, asked)

        give_away(submit, asked)
        return []


class Slurm(_Submitted):
    executor = "slurm"


class Local(_Submitted):
    executor = "local"
