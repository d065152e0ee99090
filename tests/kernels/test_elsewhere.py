"""The Triton kernels compile for real GPUs, without one: the interpreter would take what no compiler does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])  # A100, H100
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.elsewhere", str(capability)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    names = [one["kernel"] for one in compiled]
    assert {name: names.count(name) for name in names} == {
        "gather_kernel": 6,
        "expand_kernel": 6,
        "spread_kernel": 4,
        "select_kernel": 2,
        "decode_kernel": 5,
        "coded_kernel": 5,
        "outliers_kernel": 2,
        "norm_kernel": 2,
        "reduce_kernel": 6,
        "count_kernel": 3,
        "cut_kernel": 3,
        "maxima_kernel": 3,
        "repair_kernel": 6,
    }
    assert {one["for"] for one in compiled} == {capability}
    gather = next(one for one in compiled if one["kernel"] == "gather_kernel")
    assert (gather["pattern"], gather["tokens"]) == ("2:4", 1)
    assert gather["instructions"]["ld.global.v4.b32"] >= 1  # eight survivors are read at once: 16 bytes
    for one in compiled:
        if one["kernel"] == "expand_kernel" and one["dtype"] != "torch.float32":
            assert any(name.startswith("mma") for name in one["instructions"]), one  # matrix units
        if one["kernel"] == "coded_kernel" and one["tokens"] > 1:
            assert any(name.startswith("mma") for name in one["instructions"]), one
        if one["kernel"] == "decode_kernel" and one["pattern"] == "2:4":
            assert one["instructions"]["st.global.v4.b32"] >= 1, one
