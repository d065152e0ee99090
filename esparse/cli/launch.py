"""The command line: what `esparse`, `python -m esparse` and `python launch.py` do, in any folder."""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from esparse.cli import registry, session
from esparse.parts.conf_folder import conf_folder


def main() -> int:
    """Carries out what was typed; the exit code."""
    registry.register()
    return session.exit_code(hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(_run))


def _run(config: DictConfig) -> None:
    with session.mistakes():
        experiment = registry.build(config)
        settings = registry.resolved(config, experiment, HydraConfig.get().runtime.choices)
    session.carry_out(experiment, settings)
