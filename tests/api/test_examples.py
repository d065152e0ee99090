"""What README.md and examples/ show of esparse from Python is carried out."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import esparse
from tests.workshop import ROOT, furnished


def carry_out(cell: str, names: dict[str, Any]) -> None:
    """As a notebook does: what the last line is worth is shown."""
    tree = ast.parse(cell)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        print(eval(compile(ast.Expression(last.value), "cell", "eval"), names))  # type: ignore[attr-defined]


def test_the_readmes_fifteen_lines_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (ROOT / "README.md").read_text().split("## From Python\n")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], flags=re.S)
    assert len([line for line in code.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    shutil.move(furnished(tmp_path, blocks=1) / "model", tmp_path / "NAME_OR_DIR")
    # What the small model of the tests can calibrate on; the corpus stays the one that is shown.
    code = code.replace('"2:4")', '"2:4", sequences=4, length=16)').replace("sequences=32, length=64", "sequences=4")
    code = code.replace('tokenizer, "builtin")', 'tokenizer, "builtin", max_tokens=128)')
    carry_out(code, {})
    said = capsys.readouterr().out
    assert "2:4 sparsegpt sparsegpt: 50.00%" in said
    assert re.search(r"^[\d.]+ -> [\d.]+$", said, flags=re.M)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "DIR").config.num_hidden_layers == 1


def test_the_page_of_the_api_shows_a_metric_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    shutil.move(furnished(tmp_path, blocks=1) / "model", tmp_path / "NAME_OR_DIR")
    names: dict[str, Any] = {"__name__": "tests.api.test_examples"}
    carry_out(code, names)
    assert "'pattern': '4:8'" in capsys.readouterr().out
    assert names["report"].to_dict()["sparsity"]["density"] == 0.5


def test_the_page_of_the_api_names_all_that_there_is() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    assert not [name for name in esparse.__all__ if not re.search(rf"`esparse\.{name}\b", text)]
    known = inspect.signature(esparse.prune).parameters
    assert not [name for name in re.findall(r"^\| `(\w+)` \|", text, flags=re.M) if name not in known]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    monkeypatch.chdir(tmp_path)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:  # with fewer tokens than one who reads it waits for
        carry_out(cell.replace("4096", "1024").replace("sequences=8", "sequences=4").replace('": 8', '": 2'), names)
    said = capsys.readouterr().out
    assert 1 < names["dense"] < names["pruned"] < 3 * names["dense"]
    assert said.count("\n2:4 ") >= 4
    assert "Tempered" in said
    assert not list(tmp_path.iterdir())  # its checkpoint lies in a temporary folder
    assert isinstance(names["report"], esparse.Report)
