"""What ranks do in tests: here, as a process that is started anew has to be able to import it, and quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path

from esparse.ranks import Ranks, together

CONF = Path(__file__).parent.parent / "conf"


def carry_out(ranks: Ranks, runs: dict[str, list[str]], out: Path) -> None:
    """Carries out runs, by the name of each one's folder."""
    from hydra import compose, initialize_config_dir

    from esparse import experiment, schema

    schema.register()
    for name, overrides in runs.items():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides, return_hydra_config=True)
        asked = schema.build(config)
        settings = schema.resolved(config, asked, config.hydra.runtime.choices)
        experiment.run(asked, run_id=name, name=name, config=settings, folder=out / name, ranks=ranks)


def fail(ranks: Ranks) -> None:
    """The second rank fails, while the first one waits for it."""
    if ranks.rank == 1:
        raise ValueError("the second rank has a reason")
    ranks.wait()


def sleep(ranks: Ranks, folder: Path) -> None:
    (folder / str(ranks.rank)).write_text(str(os.getpid()))
    time.sleep(600)


def sleep_together(folder: Path) -> None:
    import torch

    together([torch.device("cpu")] * 2, sleep, folder)
