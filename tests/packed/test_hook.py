"""Esparse beside libraries that it does not fit: they work, and what does not is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.workshop import ROOT


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import esparse, transformers", "import transformers, esparse"])
def test_a_transformers_that_esparse_does_not_fit_works_all_the_same(first: str) -> None:
    done = python(
        "import sys\n"
        "sys.modules['esparse.packed.quantizer'] = None\n"
        f"{first}, transformers.quantizers.auto\n"
        "from transformers import AutoConfig\n"
        "print('WORKS', AutoConfig.for_model('llama').model_type)\n"
    )
    assert "WORKS llama" in done.stdout, done.stderr
    assert done.stderr.count("transformers cannot load checkpoints that esparse packed") == 1


@pytest.mark.slow
def test_the_module_that_is_watched_keeps_its_loader(tmp_path: Path) -> None:
    done = python("import esparse, inspect, transformers.quantizers.auto as auto; print(len(inspect.getsource(auto)))")
    assert int(done.stdout) > 1000, done.stderr


@pytest.mark.tries(1)
@pytest.mark.parametrize("error", ["ImportError('Numba needs NumPy 2.3 or less')", "RuntimeError('no locator')"])
def test_a_numba_that_is_broken_is_done_without_and_said(error: str, tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text(f"raise {error}\n")
    done = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from esparse import kernels\n"
        "print(kernels.loops('histogram'), kernels.loops('maxima'), kernels.loops('compiled'))\n"
    )
    assert done.stdout.strip() == "None None None", done.stderr
    assert "numba is installed and does not work here" in done.stderr
