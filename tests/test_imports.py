"""Which part may import which, and that the command line answers before torch is loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "esparse").rglob("*.py"))

# From the bottom to the top: a part imports only what stands on a lower line, or stands in the same part.
LAYERS = [
    {"patterns", "linalg", "report", "cores", "ranks", "kernels", "cluster", "launchers"},
    {"models", "data"},
    {"stats", "owner"},
    {"packed"},
    {"metrics", "shuffles", "updates", "prepare", "gradients", "evaluate", "bench", "audit", "grid"}
    | {"tracking", "progress"},
    {"runs"},
    {"recoveries", "allocations", "plots", "pivot", "latex", "journal"},
    {"method", "curves", "pairs"},
    {"walk", "channels"},
    {"prune", "plan", "pictures"},
    {"export", "record", "measure", "page"},
    {"experiment", "tables"},
    {"published"},
    {"schema"},
    {"session", "folder"},
    {"job"},
    {"submission"},
    {"sweep"},
]
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
FENCES = {
    "hydra": {"schema", "session"},
    "wandb": {"tracking"},
    "transformers": {"models", "data", "evaluate", "packed", "export", "session", "measure", "record"},
    "datasets": {"data", "evaluate"},
    "lm_eval": {"evaluate"},
    "submitit": {"submission", "job"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_flow_one_way(path: Path) -> None:
    own = path.with_suffix("").parts[1]
    if own == "__init__":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "esparse" and len(parts) > 1 and parts[1] in HEIGHT and parts[1] != own:
            assert HEIGHT[parts[1]] < HEIGHT[own], f"{own} must not import {parts[1]}"
        if parts[0] in FENCES:
            assert own in FENCES[parts[0]], f"{own} must not import {parts[0]}"


@pytest.mark.parametrize("arguments", [["--help"], ["metric=wandaa"], ["metric.bin=3"], ["pattern=4:2"]])
def test_the_command_line_answers_without_torch(arguments: list[str]) -> None:
    code = (
        "import runpy, sys, atexit\n"
        f"sys.argv = ['launch.py', *{arguments!r}]\n"
        "atexit.register(lambda: print('LOADED', sorted({'torch', 'transformers', 'wandb'} & set(sys.modules))))\n"
        "runpy.run_path('launch.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
