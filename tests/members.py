"""What ranks do in tests: here, as a process that is started anew has to be able to import it, and quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path

from esparse.parallel.ranks import Ranks, together

CONF = Path(__file__).parent.parent / "conf"


def carry_out(ranks: Ranks, runs: dict[str, list[str]], out: Path) -> None:
    """Carries out runs, by the name of each one's folder."""
    from hydra import compose

    from esparse.cli import registry
    from esparse.run import experiment
    from tests.composing import composing

    registry.register()
    for name, overrides in runs.items():
        with composing():
            config = compose("config", overrides, return_hydra_config=True)
        asked = registry.build(config)
        settings = registry.resolved(config, asked, config.hydra.runtime.choices)
        experiment.run(asked, run_id=name, name=name, config=settings, folder=out / name, ranks=ranks)


def exchange(ranks: Ranks) -> None:
    """Tries all that ranks can tell each other; then the second one fails, while the first one waits for it."""
    import torch

    first, rank = ranks.leads, ranks.rank
    assert ranks.gather(rank) == [0, 1]
    assert ranks.from_first(lambda: f"of {rank}") == "of 0"
    assert (ranks.before(5), ranks.share(torch.arange(5)).tolist()) == ((0, [0, 1, 2]) if first else (3, [3, 4]))
    rows = torch.ones(3, 2, dtype=torch.bfloat16) if first else torch.zeros(0, 2)
    assert torch.equal(ranks.joined(rows), torch.ones(3, 2, dtype=torch.bfloat16))
    assert ranks.joined(torch.zeros(0, 2)).shape == (0, 2)
    total, count = torch.tensor([2.0**24, 1.0]) if first else torch.tensor([1.0, 2.0]), torch.tensor(2**60 + rank)
    for x in (total, count):
        ranks.sum_(x)
    assert total.tolist() == [2.0**24, 3.0]  # 2^24 + 1 has no float32
    assert int(count) == 2**61 + 1
    low, high = torch.tensor([float(rank), -1.0]), torch.tensor([float(rank), -1.0])
    ranks.min_(low)
    ranks.max_(high)
    assert (low.tolist(), high.tolist()) == ([0.0, -1.0], [1.0, -1.0])
    copies = [torch.full((2, 3), float(rank), dtype=t).T for t in (torch.float32, torch.bfloat16, torch.float16)]
    copies.append(torch.nn.Parameter(torch.tensor(float(rank))))
    ranks.copy_from_first(copies)
    assert all(not copy.any() for copy in copies)
    if ranks.rank == 1:
        raise ValueError("the second rank has a reason")
    ranks.wait()


def sleep(ranks: Ranks, folder: Path) -> None:
    (folder / str(ranks.rank)).write_text(str(os.getpid()))
    time.sleep(600)


def sleep_together(folder: Path) -> None:
    import torch

    together([torch.device("cpu")] * 2, sleep, folder)
