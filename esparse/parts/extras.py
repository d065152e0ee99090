"""Libraries that pip's extras install, and one sentence for each that is missing.

Pruning from Python and loading packed models need none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from esparse.errors import Mistake

# Import name: (package, extra of pyproject.toml that installs it).
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
    "vl_convert": ("vl-convert-python", "page"),
    "numba": ("numba", "cpu"),
    "gguf": ("gguf", "gguf"),
}

# Name of a class of esparse: (library that it needs, what needs it).
PARTS = {
    "Wandb": ("wandb", "tracking=wandb (the other choice: tracking=none)"),
    "Lsa": ("scipy", "shuffle=lsa"),
    "Alternating": ("scipy", "shuffle=best"),
}
CORPORA = {"c4": "datasets", "wikitext2": "pyarrow", "ptb": "pyarrow"}


def sentence(module: str, what: str = "this") -> str | None:
    """The sentence for a missing module; None if the module is in no extra."""
    known = EXTRAS.get(module.partition(".")[0])
    if known is None:
        return None
    package, extra = known
    return f"{what} needs {package}, which is not installed: pip install 'esparse[{extra}]'"


def need(module: str, what: str) -> None:
    """Raises Mistake if a module is not installed; imports nothing."""
    if find_spec(module) is None:
        raise Mistake(sentence(module, what) or f"{what} needs {module}, which is not installed")


def need_part(part: object) -> None:
    """Raises Mistake if a library is missing that this part of a method, or of a run, needs."""
    if type(part).__module__.startswith("esparse.") and type(part).__name__ in PARTS:
        need(*PARTS[type(part).__name__])


def check(experiment: Any) -> None:
    """Raises Mistake, before any work, if a library is missing that the run of an `Experiment` needs."""
    for part in (experiment.tracking, experiment.shuffle):
        need_part(part)
    if experiment.model.store == "shards":
        need("accelerate", "model.store=shards")
    if experiment.model.path.lower().endswith(".gguf"):
        for module in ("gguf", "accelerate"):
            need(module, f"the GGUF file {experiment.model.path}")
    if experiment.zeroshot.tasks:
        need("lm_eval", "zeroshot")
    for group, names in (("calibration", [experiment.calibration.corpus]), ("evaluate", experiment.evaluate.corpora)):
        for corpus in names:
            if corpus in CORPORA:
                need(CORPORA[corpus], f"{group}={corpus}")
    for path in (experiment.calibration.path, experiment.evaluate.path):
        if path is not None and path.lower().endswith(".parquet"):
            need("pyarrow", path)


def explained(main: Callable[[], int], *, program: str) -> int:
    """Runs `main` and returns its exit code; prints one sentence and returns 2 if a library of an extra is missing."""
    try:
        return main()
    except ModuleNotFoundError as error:
        text = sentence(error.name or "", program)
        if text is None:
            raise
        print(f"esparse: {text}", file=sys.stderr)
        return 2
