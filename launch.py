"""Prunes a language model and measures it: `python launch.py [-m] [group=option] [key=value] ...`.

    python launch.py                                              the built-in model with E-Sparse at 2:4
    python launch.py -m metric=entropy,wanda pattern=2:4,4:8      a sweep
    python launch.py --help                                       every group and setting

Exit code: 0 all runs finished (now or before), 1 a run failed, 2 a mistake on the command line.
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from esparse.cli import registry, session

registry.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    with session.mistakes():
        experiment = registry.build(config)
        settings = registry.resolved(config, experiment, HydraConfig.get().runtime.choices)
    session.carry_out(experiment, settings)


if __name__ == "__main__":
    sys.exit(session.exit_code(main))
