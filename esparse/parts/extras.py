"""Libraries that come with extras, as pip calls them, and the one sentence for each that is missing.

Pruning from Python and loading what was packed need none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from esparse.errors import Mistake

# By the name with which it is imported: the package, and the extra of pyproject.toml that installs it.
EXTRAS = {
    "hydra": ("hydra-core", "run"),
    "omegaconf": ("omegaconf", "run"),
    "rich": ("rich", "run"),
    "accelerate": ("accelerate", "run"),
    "scipy": ("scipy", "run"),
    "wandb": ("wandb", "track"),
    "datasets": ("datasets", "data"),
    "pyarrow": ("pyarrow", "data"),
    "lm_eval": ("lm-eval", "eval"),
    "submitit": ("submitit", "slurm"),
    "matplotlib": ("matplotlib", "plot"),
    "numba": ("numba", "cpu"),
}


def sentence(module: str, what: str = "this") -> str | None:
    """What to say if that module is missing; None for a module of no extra."""
    known = EXTRAS.get(module.partition(".")[0])
    if known is None:
        return None
    package, extra = known
    return f"{what} needs {package}, which is not installed: pip install 'esparse[{extra}]'"


def need(module: str, what: str) -> None:
    """Raises Mistake if the module of an extra is not installed; imports nothing."""
    if find_spec(module) is None:
        raise Mistake(sentence(module, what) or f"{what} needs {module}, which is not installed")


def check(experiment: Any) -> None:
    """Raises Mistake if a library is missing that the run of an `Experiment` will need, before there is any work."""
    for module, what in _needed(experiment):
        need(module, what)


def explained(main: Callable[[], int], *, program: str) -> int:
    """What `main` returns; 2, and one sentence, if a library of an extra is missing."""
    try:
        return main()
    except ModuleNotFoundError as error:
        said = sentence(error.name or "", program)
        if said is None:
            raise
        print(f"esparse: {said}", file=sys.stderr)
        return 2


def _needed(experiment: Any) -> Iterator[tuple[str, str]]:
    if type(experiment.tracking).__name__ == "Wandb":
        yield "wandb", "tracking=wandb (the other choice: tracking=none)"
    if type(experiment.shuffle).__name__ in ("Lsa", "Best"):
        yield "scipy", f"shuffle={type(experiment.shuffle).__name__.lower()}"
    if experiment.model.store == "shards":
        yield "accelerate", "model.store=shards"
    if experiment.zeroshot.tasks:
        yield "lm_eval", "zeroshot"
    read = {experiment.calibration.corpus: "calibration"} | dict.fromkeys(experiment.evaluate.corpora, "evaluate")
    for corpus, group in read.items():
        if corpus == "c4":
            yield "datasets", f"{group}=c4"
        elif corpus in ("wikitext2", "ptb"):
            yield "pyarrow", f"{group}={corpus}"
    for path in (experiment.calibration.path, experiment.evaluate.path):
        if path is not None and path.lower().endswith(".parquet"):
            yield "pyarrow", path
