"""Exports as a user asks for them: a run as a process, and its checkpoint in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.workshop import ROOT, furnished, launch, small_run

FROM = "from transformers import AutoModelForCausalLM, AutoTokenizer"


def pages_example() -> str:
    """The example of docs/export.md of loading, and what kinds of layers it got."""
    text = (ROOT / "docs" / "export.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)[0]
    kinds = "{type(m).__name__ for n, m in model.named_modules() if n.endswith('proj')}"
    return code.replace('"DIR"', "sys.argv[1]") + f"print('KINDS', sorted({kinds}))"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnished(tmp_path_factory.mktemp("workshop"), blocks=2)


def only_record(root: Path) -> tuple[Path, dict[str, Any]]:
    [path] = root.glob("*/result.json")
    return path.parent, json.loads(path.read_text())


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import sys", f"import sys\n{FROM}"])
def test_a_packed_run_is_loaded_after_import_esparse(first: str, workshop: Path, tmp_path: Path) -> None:
    """The order of the imports must not matter."""
    done = launch(*small_run(workshop, tmp_path / "out"), "export=packed", "export.dtype=float16", "pattern=4:8")
    assert done.returncode == 0, done.stderr
    folder, record = only_record(tmp_path / "out")
    assert record["export"]["format"] == "packed" and record["export"]["path"] == str(folder / "export")
    assert record["seconds_by_stage"]["export"] > 0
    assert not list(folder.glob("export.*"))
    assert all(layer["packed_bytes"] < layer["dense_bytes"] for layer in record["layers"])
    read = python(f"{first}\n{pages_example()}", record["export"]["path"])
    assert "KINDS ['PackedLinear']" in read.stdout, read.stderr


@pytest.mark.slow
def test_a_dense_run_is_loaded_without_esparse(workshop: Path, tmp_path: Path) -> None:
    place = tmp_path / "there"
    done = launch(
        *small_run(workshop, tmp_path / "out"),
        "export=dense",
        f"export.path={place}",
        "model.store=shards",
        "shuffle=none",
    )
    assert done.returncode == 0, done.stderr
    read = python("import sys\n" + pages_example().partition("\n")[2], str(place))
    assert "KINDS ['Linear']" in read.stdout, read.stderr


def test_every_pruned_matrix_of_a_dense_export_holds_its_pattern_as_stored(workshop: Path, tmp_path: Path) -> None:
    """Or the export says in its name, its card, its record and on the terminal that it does not."""
    folds = ["shuffle=best", "shuffle.foldable=true", "update=obs"]
    free = ["shuffle=esparse", "export.order=original"]
    for choice, held, name in (folds, 14, "export"), (free, 0, "export-original-order"):
        done = launch(*small_run(workshop, tmp_path / name), "export=dense", *choice)
        assert done.returncode == 0, done.stderr
        folder, record = only_record(tmp_path / name)
        exported = record["export"]
        assert exported["path"] == str(folder / name) and exported["of_layers"] == 14
        assert exported["holds_in"] == held == len(holding(folder / name)), choice
        card = (folder / name / "README.md").read_text()
        said = f"2:4 holds as stored in {held} of 14 layers"
        assert said in card and said in done.stderr and str(folder / name) in done.stderr
        assert ("no groups" in card.partition("## Recipe")[0]) == (held == 0)
        assert ("cuSPARSELt" in exported["engines"]) == (held > 0)


def holding(folder: Path) -> list[str]:
    """The matrices whose rows keep at most two of any four neighbours, counted one group at a time."""
    stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    found = []
    for name, value in stored.items():
        if name.endswith("proj.weight"):
            rows = (value != 0).tolist()
            if all(sum(row[first : first + 4]) <= 2 for row in rows for first in range(0, len(row), 4)):
                found.append(name)
    return found


@pytest.mark.slow
def test_several_processes_leave_one_checkpoint(workshop: Path, tmp_path: Path) -> None:
    done = launch(*small_run(workshop, tmp_path), "export=packed", "model.devices=cpu:2")
    assert done.returncode == 0, done.stderr
    assert (only_record(tmp_path)[0] / "export" / "config.json").is_file()


def test_biases_without_a_place_stop_the_run_before_it_prunes(workshop: Path, tmp_path: Path) -> None:
    done = launch(*small_run(workshop, tmp_path), "export=dense", "recovery=bias", "shuffle=none")
    assert done.returncode == 2
    assert "has no place for them: use export=packed" in done.stderr
    assert "block 1 of" not in done.stderr


@pytest.mark.tries(3)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export=packed", "pattern=50%", "shuffle=none"], "export=packed stores n:m patterns"),
        (["export=packed", "shuffle=esparse", "export.order=original", "outliers=16:256"], "use export.order=physical"),
        (["export=dense", "shuffle=esparse"], "Use shuffle.foldable=true"),
        (["export=dense", "shuffle=best"], "or export.order=original"),
        (["export=dense", "shuffle=gns", "pattern=8:16", "outliers=16:256"], "or export=packed"),
        (["export=dense", "export.order=any"], "export.order must be one of original, physical"),
        (["export=dense", "export.dtype=int8"], "export.dtype must be one of"),
    ],
)
def test_mistakes_stop_before_any_work(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = launch(*arguments, f"output_root={tmp_path}")
    assert done.returncode == 2
    assert words in done.stderr


def test_import_esparse_loads_nothing_heavy() -> None:
    read = python("import sys, esparse; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert read.stdout.strip() == "[]"
