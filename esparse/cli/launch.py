"""The command line: what `esparse`, `python -m esparse` and `python launch.py` do, in any folder."""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from esparse.cli import foresight, registry, remarks
from esparse.cli.attempt import carry_out
from esparse.cli.main import exit_code, mistakes
from esparse.parts.conf_folder import conf_folder


def main() -> int:
    """Carries out the typed command; returns the exit code."""
    registry.register()
    return exit_code(hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(_run))


def _run(config: DictConfig) -> None:
    with mistakes():
        experiment = registry.build(config)
        hydras = HydraConfig.get()
        choices = hydras.runtime.choices
        settings = registry.resolved(config, experiment, choices)
        remarks.check_method(choices, typed=hydras.overrides.task, file=str(hydras.job.config_name))
        foresight.check(experiment, settings)
    remarks.say(remarks.remarks(settings, choices, experiment.method()))
    carry_out(experiment, settings)
