"""Savings counted from configurations alone, against arithmetic by hand and what is published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from esparse import option, patterns
from esparse.models.load import published_config
from esparse.packed import quantised, savings
from esparse.packed.memory import main
from esparse.packed.savings import as_published, of_model
from esparse.packed.sizes import of_codes, of_matrix
from tests.models.families import tiny

# GB in 16 bit: two embeddings, per block 4 d^2 + 3 d f, of which 9 of 16 bits (in memory) are left at 2:4.
WIDTHS = {"llama-7b": (4096, 11008, 32), "llama-65b": (8192, 22016, 80)}


def llama(name: str) -> PretrainedConfig:
    config = published_config(f"huggyllama/{name}")
    assert config is not None
    return config


@pytest.mark.parametrize("name", WIDTHS)
def test_a_llama_by_hand(name: str) -> None:
    width, inner, blocks = WIDTHS[name]
    matrices = 2 * blocks * (4 * width**2 + 3 * width * inner)
    rest = 2 * (2 * 32000 * width + (2 * blocks + 1) * width)
    saving = of_model(llama(name), patterns.parse("2:4"))
    assert saving.dense == matrices + rest
    assert saving.in_memory == rest + matrices * 9 // 16
    assert saving.on_disk == rest + matrices * 8.75 / 16


def test_experts_count_as_packed() -> None:
    saving = of_model(tiny("mixtral").config, patterns.parse("2:4"), torch.float32)
    # Three blocks: q and o, k and v, and four experts with gate, up and down; 32 wide, 48 inside, 8 a head.
    matrices = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 4 * 3 * 32 * 48)
    assert saving.dense - saving.in_memory == matrices * 4 * 15 // 32  # a half of 32 bits, less one


@pytest.mark.parametrize(("name", "per_cent"), savings.PUBLISHED.items())
def test_what_is_published_comes_out_when_counted_as_there(name: str, per_cent: float) -> None:
    assert round(100 * as_published(llama(name), patterns.parse("2:4")).share_in_memory, 2) == per_cent


@pytest.mark.parametrize(
    ("asked", "in_memory", "on_disk"),
    [
        (("2:4", None), 9, 8.75),
        (("4:8", None), 9, 8.875),
        (("8:16", None), 9, 8.875),
        (("8:16", "16:256"), 10.5, 10.375),
    ],
)
def test_bits_per_weight(asked: tuple[str, str | None], in_memory: float, on_disk: float) -> None:
    size = of_matrix(patterns.parse(*asked), 64, 1024, torch.bfloat16)
    assert [8 * n / (64 * 1024) for n in (size.dense, size.in_memory, size.on_disk)] == [16, in_memory, on_disk]


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("qwen2").config.save_pretrained(tmp_path / "small")
    assert main([str(tmp_path / "small"), "--patterns", "2:4,8:16+16:256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | pattern | dense |")
    assert [line.split("|")[1:3] for line in lines[2:4]] == [[" small ", " 2:4 "], [" small ", " 8:16+16:256 "]]


def test_small_models_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(tmp_path / place / "small") for place in ("one", "two")]
    for folder in folders:
        tiny("llama").config.save_pretrained(folder)
    assert main([*folders, folders[0], "--patterns", "2:4"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [row[0] for row in rows] == folders
    assert all("0.00 GB" not in cell for row in rows for cell in row)


def test_a_model_by_its_name_on_the_command_line() -> None:
    assert savings.config_of("llama-7b").hidden_size == 4096
    assert savings.config_of("tiny").model_type == "llama"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--patterns", "50%"], "no n:m pattern"),
        (["/nowhere/at/all"], "there is no directory /nowhere/at/all"),
        (["a b"], "a b is neither"),
        (["tiny", ""], "a model is a hub name, a directory or an option of model=, got ''"),
        (["EMPTY"], "the model in EMPTY cannot be loaded: "),
    ],
)
def test_mistakes(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_model_out_of_reach_and_one_with_code_get_advice_that_this_command_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it waits for an answer"))
    assert main(["nobody/nothing"]) == 2
    said = capsys.readouterr().err
    assert "model.path" not in said and "copy its config.json into a directory here, and name that" in said
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "has Python code of its own: the bytes" in said and "trust_remote_code" not in said


def test_a_row_has_the_name_of_the_models_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    tiny("llama").config.save_pretrained(folder)
    assert main([str(folder)]) == main([f"{folder}/"]) == main([str(folder / "config.json")]) == 0
    assert capsys.readouterr().out.count("| mine | 2:4 |") == 3


def test_help_comes_before_torch() -> None:
    code = (
        "import sys, runpy, atexit; sys.argv = ['memory', '--help']\n"
        "atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\n"
        "runpy.run_module('esparse.packed.memory', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "TORCH False" in done.stdout and "--patterns" in done.stdout


@pytest.mark.parametrize("pattern", [("2:4", None), ("8:16", "16:256"), ("dense", None)], ids=str)
@pytest.mark.parametrize(
    ("quantise", "changes"),
    [("int8", {}), ("int4", {"symmetric": False}), ("nf4", {"outlier_bits": None}), ("int3", {"scale": "float32"})],
    ids=str,
)
def test_a_quantised_matrix_takes_the_bytes_of_its_tensors(
    quantise: str, changes: dict[str, Any], pattern: tuple[str, str | None]
) -> None:
    parsed, grid = patterns.parse(*pattern), option("quantise", quantise, group=64, **changes)
    weight_OI = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    rounded_OI, scales = grid.nearest(weight_OI, parsed.keep_top(weight_OI.abs()), parsed)
    tensors = quantised.to_file(rounded_OI.half() + 0.0, parsed, grid, scales)
    counted = of_codes(parsed, 8, 512, torch.float16, grid)
    assert counted.dense == 8 * 512 * 2
    assert counted.on_disk == sum(value.nbytes for value in tensors.values())
    assert counted.in_memory == quantised.from_file(tensors, parsed, 512, grid).nbytes


def test_the_command_says_what_quantised_values_save(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path / "model")
    asked = [str(tmp_path / "model"), "--patterns", "2:4,dense", "--quantise"]
    assert main([*asked, "none,int8"]) == 0
    rows = [line.split("|")[2:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| model")]
    cells = [(pattern.strip(), quantise.strip()) for pattern, quantise in rows]
    assert cells == [("pattern", "quantise"), ("2:4", "none"), ("2:4", "int8"), ("dense", "int8")]
    for quantise, words in (
        ("none", "only n:m can be packed, or dense with --quantise"),
        ("int4", "quantise.group=64 does not divide the 32 inputs"),
        ("int5", "int5"),
    ):
        assert main([*asked, quantise]) == 2
        assert words in capsys.readouterr().err
