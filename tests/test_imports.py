"""Which part may import which, what modules are called, and that the command line answers before torch is loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# By dotted name below esparse, a package by its own: cli, cli.session.
MODULES = {
    ".".join(path.relative_to(ROOT / "esparse").with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted((ROOT / "esparse").rglob("*.py"))
}

# From the bottom to the top: a part imports only what stands on a lower line, or stands in the same part. Pruning
# stands beside what counts bytes, measures quality and takes times: it is to know of none of them.
LAYERS = [
    {"errors"},
    {"parts"},
    {"patterns", "linalg", "records", "parallel", "kernels"},
    {"models", "data", "stats", "jobs", "reports"},
    {"quantise"},
    {"metrics", "shuffles", "updates", "prepare"},
    {"recoveries", "allocations"},
    {"pruning", "packed", "evaluate", "bench"},
    {"export", "vllm"},
    {"run"},
    {"cli"},
    {"sweeps"},
    {"tables", "sweep", "published", "__main__", "api"},
]
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
FENCES = {
    "hydra": {"cli"},
    "wandb": {"run.tracking"},
    "transformers": {
        "models",
        "data",
        "evaluate",
        "packed",
        "export",
        "cli.main",
        "run.loading",
        "run.record",
        "run.measure",
        "api",
    },
    "datasets": {"data", "evaluate"},
    "lm_eval": {"evaluate"},
    "submitit": {"sweeps"},
    "vllm": {"vllm"},
    "peft": {"packed.adapters"},
}
LOOSE = 8  # modules that may lie in no folder


def imported(path: Path, *, for_types: bool) -> set[str]:
    """What a file imports anywhere in it; with `for_types` also what only type checkers do."""
    names: set[str] = set()
    for node in nodes(ast.parse(path.read_text()), for_types):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def nodes(tree: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if for_types or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from nodes(child, for_types)


def of_esparse(names: set[str]) -> set[str]:
    """The modules among them, by their names below esparse."""
    return {name.removeprefix("esparse.") for name in names if name.startswith("esparse.")} & set(MODULES)


def test_imports_flow_one_way() -> None:
    upward = [
        f"{name} must not import {other}"
        for name, path in MODULES.items()
        for other in of_esparse(imported(path, for_types=True))
        if name and (own := name.partition(".")[0]) != (part := other.partition(".")[0])
        if HEIGHT[part] >= HEIGHT[own]
    ]
    assert not upward


def test_libraries_stay_behind_their_fences() -> None:
    outside = [
        f"{name} must not import {library}"
        for name, path in MODULES.items()
        for library in {other.partition(".")[0] for other in imported(path, for_types=True)} & set(FENCES)
        if not {name, name.partition(".")[0]} & FENCES[library]
    ]
    assert not outside


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Types apart: a training names the class of its settings, which calls it; the writer what is exported."""
    graph = {name: of_esparse(imported(path, for_types=False)) for name, path in MODULES.items() if name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_every_name_of_a_module_stands_in_one_place() -> None:
    names = Counter(name.rpartition(".")[2] for name in MODULES if not name.endswith("__main__"))
    assert not [name for name, times in names.items() if times > 1]


def test_few_modules_lie_in_no_folder() -> None:
    assert len(list((ROOT / "esparse").glob("*.py"))) <= LOOSE


@pytest.mark.tries(3)
@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["metric=wandaa"], ["metric.bin=3"], ["pattern=4:2"], ["--version"], ["calibration.length=9999"]),
        *(["model=hf", "model.path=/nowhere"], ["model=hf", "model.path=a/b"], ["model.devices=gpu"]),
        ["-m", "hydra/launcher=local", "calibration=text", "calibration.path=/nowhere.txt,/nowhere2.txt"],
    ],
)
def test_the_command_line_answers_without_torch(arguments: list[str]) -> None:
    code = (
        "import runpy, sys, atexit\n"
        f"sys.argv = ['launch.py', *{arguments!r}]\n"
        "atexit.register(lambda: print('LOADED', sorted({'torch', 'transformers', 'wandb'} & set(sys.modules))))\n"
        "runpy.run_path('launch.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
