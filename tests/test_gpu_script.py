"""experiments/gpu.py without a GPU: parts that fail, hang or are cut off leave what they had measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose

from esparse.cli import registry
from tests.composing import composing

# With a child that holds its output open.
HANGS = """
import subprocess, sys, time
print('{"a": 4}', flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
time.sleep(60)
"""
SCRIPT = Path(__file__).parent.parent / "experiments" / "gpu.py"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPT.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return loaded("gpu")


def test_the_methods_that_are_timed_are_those_of_the_command_line_without_hydra() -> None:
    bench = loaded("bench_prune")
    registry.register()
    for words in bench.METHODS.values():
        with composing():
            assert bench.method_of(words) == registry.build(compose("config", [*words, "tracking=none"])).method()


def part(gpu: ModuleType, name: str, code: str, seconds: float = 20) -> object:
    return gpu.Part(name, seconds, [sys.executable, "-c", code])


@pytest.mark.slow
def test_every_part_leaves_what_it_said(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [
        part(gpu, "fine", "print('noise'); print('{\"a\": 1}'); print('{\"a\": 2}')", 1.5),
        part(gpu, "fails", "print('{\"a\": 3}'); raise ValueError('no such kernel')", 1.5),
        part(gpu, "hangs", HANGS, 1.5),
        part(gpu, "behind", "print('{\"a\": 5}')"),
    ]
    results = gpu.Results(tmp_path / "new" / "gpu.json", device="x")
    assert not gpu.carry_out_all(wanted, results, total_s=40)
    written = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert written["device"] == "x"
    parts = written["parts"]
    got = [[row["a"] for row in parts[name]["rows"]] for name in ("fine", "fails", "hangs", "behind")]
    assert got == [[1, 2], [3], [4], [5]]
    statuses = [parts[name]["status"] for name in ("fine", "fails", "hangs", "behind")]
    assert statuses == ["ok", "failed with 1", "out of time", "ok"]
    assert parts["fails"]["said"][-1] == "ValueError: no such kernel"
    assert "out of time" in capsys.readouterr().out


def test_parts_share_what_others_left_and_stop_at_the_end(gpu: ModuleType, tmp_path: Path) -> None:
    wanted = [part(gpu, str(i), "pass", seconds) for i, seconds in enumerate((100, 50, 30))]
    results = gpu.Results(tmp_path / "gpu.json")
    assert gpu.carry_out_all(wanted, results, total_s=200)
    given = [results.content["parts"][str(i)]["given_s"] for i in range(3)]
    assert given[0] == 100 and 140 < given[1] <= 150 and 160 < given[2] <= 180
    results = gpu.Results(tmp_path / "late.json")
    assert not gpu.carry_out_all(wanted, results, total_s=4)
    assert {kept["status"] for kept in results.content["parts"].values()} == {"no time was left"}


def test_nothing_takes_longer_than_the_whole(gpu: ModuleType, tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "gpu.json")
    gpu.carry_out_all([part(gpu, "long", "pass", 1000)], results, total_s=60)
    assert results.content["parts"]["long"]["given_s"] <= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "gpu.py measures a GPU, and PyTorch sees none here (--dry-run tries the script itself)\n"


@pytest.mark.slow
def test_a_dry_run_measures_products(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--parts", "larger", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("gpu-dry-run-*.json")
    rows = json.loads(file.read_text())["parts"]["larger"]["rows"]
    assert {row["layer"] for row in rows if "layer" in row} == {
        f"{model} {layer}" for model in ("llama-13b", "llama-65b") for layer in ("q_proj", "up_proj")
    }
    assert all(row["speedup"] > 0 for row in rows if "speedup" in row)
    assert "limits" in rows[-1]
