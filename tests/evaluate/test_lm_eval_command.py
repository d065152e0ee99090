"""lm-eval's own command on what a run exported says what the run's record says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workshop import ROOT, launch

LIMIT = 60
RUN = ["zeroshot=builtin", f"zeroshot.limit={LIMIT}", "metric=wanda", "tracking=none", "calibration.sequences=4"]
RUN += ["calibration.length=64", "evaluate=none", "export.dtype=float32"]


def documented(kind: str) -> list[str]:
    """The command of docs/serving.md, whose `lm_eval` is the one of this environment."""
    page = (ROOT / "docs" / "serving.md").read_text()
    wanted = r"^lm_eval .*DIR.*$" if kind == "dense" else r"^python -m esparse\.evaluate\.lm_eval .*DIR.*$"
    [line] = re.findall(wanted, page, flags=re.M)
    words = shlex.split(line, comments=True)
    return [sys.executable, "-m", "lm_eval", *words[1:]] if kind == "dense" else [sys.executable, *words[1:]]


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        pytest.param("dense", ["shuffle=none", "pattern=1:4"], marks=pytest.mark.slow),
        pytest.param("packed", ["shuffle=esparse", "pattern=2:4"], marks=pytest.mark.slow),
        pytest.param("dense", ["shuffle=esparse", "shuffle.foldable=true", "pattern=8:16"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scores_are_the_records_to_the_last_digit(kind: str, choices: list[str], tmp_path: Path) -> None:
    done = launch(*RUN, *choices, f"export={kind}", f"output_root={tmp_path}/out", f"export.path={tmp_path}/export")
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("out/*/result.json")
    command = [word.replace("DIR", f"{tmp_path}/export") for word in documented(kind)]
    measured = scores([*command, "--limit", str(LIMIT)], tmp_path)
    expected = json.loads(path.read_text())["zeroshot"]["builtin"]["measures"]
    for name in ("acc", "acc_norm"):
        assert measured[f"{name},none"] == expected[name]["pruned"] != expected[name]["dense"]
        assert measured[f"{name}_stderr,none"] == expected[name]["stderr"]


def scores(command: list[str], folder: Path) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command += ["--device", "cpu", "--output_path", str(folder / "scores")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = folder.glob("scores/**/results_*.json")
    answer: dict[str, Any] = json.loads(file.read_text())["results"]["builtin"]
    return answer
