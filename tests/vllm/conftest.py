"""A vLLM of its own environment, which `ESPARSE_VLLM_PYTHON` names (.ci/run builds one), with esparse beside it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import esparse
from esparse.models.load import BUILTIN
from tests.vllm.beside import with_esparse
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
    return with_esparse(vllm_python, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Packs the built-in model, or the one that ESPARSE_VLLM_MODEL names, in a pattern after a shuffle; once each.

    The shuffle `foldable` is that of E-Sparse with orders that the layers before absorb.
    """
    place, model_path = tmp_path_factory.mktemp("packed"), os.environ.get("ESPARSE_VLLM_MODEL", str(BUILTIN))

    def packed(pattern: str, shuffle: str | None) -> Path:
        folder = place / f"{pattern.replace(':', 'of')}-{shuffle}"
        if not folder.exists():
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(model_path)
            part = esparse.option("shuffle", "esparse", foldable=True) if shuffle == "foldable" else shuffle
            report = esparse.prune(model, tokenizer, pattern, metric="wanda", shuffle=part, sequences=8, length=64)
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
