"""vLLM's entry point to esparse, in an environment without vLLM and with one that esparse does not fit."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest

from esparse.vllm import register


@pytest.mark.parametrize("found", ["none", "another"])
def test_a_vllm_that_esparse_does_not_fit_goes_on_without_it(
    found: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = ["vllm", "model_executor", "layers", "quantization"]
    for length in range(1, len(path) + 1):
        name = ".".join(path[:length])
        monkeypatch.setitem(sys.modules, name, None if found == "none" else ModuleType(name))
    with caplog.at_level(logging.WARNING, "esparse"):
        register()
    [said] = [record.getMessage() for record in caplog.records if record.name == "esparse"]
    assert said.startswith("vLLM cannot serve checkpoints that esparse packed") and "esparse[vllm]" in said
