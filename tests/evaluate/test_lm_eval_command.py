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

from esparse.errors import Mistake
from esparse.evaluate import lm_eval
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


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--model hf --tasks builtin", "which checkpoint to load: --model hf --model_args pretrained=DIR"),
        ("--tasks builtin", "which checkpoint to load"),
        ("run --model hf -a dtype=float32,pretrained=./nowhere -t builtin", "there is no directory ./nowhere"),
        pytest.param(
            "--model dummy --tasks nosuch", "Tasks not found: nosuch", marks=pytest.mark.slow
        ),  # reads all tasks
    ],
)
def test_what_lm_eval_cannot_run_is_one_sentence(
    typed: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lm_eval", *typed.split()])
    assert lm_eval.main() == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esparse: ")]
    assert words in line


@pytest.mark.parametrize(
    "typed",
    [
        "run --help",
        "ls tasks",
        "--model local-completions --tasks builtin",
        "--model hf --config evaluation.yaml",
        "--model=hf --model_args=pretrained=here --tasks builtin",
        '--model hf --model_args {"pretrained":"here"}',
    ],
)
def test_what_is_lm_evals_is_left_to_it(typed: str) -> None:
    lm_eval.check(typed.split())


def test_only_refusals_lose_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(error: Exception) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "dummy"])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: ends(Mistake("the file is damaged")))
    assert lm_eval.main() == 2 and capsys.readouterr().err == "esparse: the file is damaged\n"
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: ends(ValueError("of another library")))
    with pytest.raises(ValueError, match="of another library"):
        lm_eval.main()
