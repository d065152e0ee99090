"""What a run needs to be tried as a user would: a model directory, a text, the overrides, the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from esparse.models.load import BUILTIN
from tests import forks

ROOT = Path(__file__).parent.parent


def furnished(folder: Path, *, blocks: int) -> Path:
    """Puts a LLaMA with random weights, in two shards or more, and a text into the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model", max_shard_size="150KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    (folder / "held").mkdir()
    (folder / "held" / "text.txt").write_text("Pack my box with five dozen liquor jugs. " * 200)
    return folder


def small_run(workshop: Path, output_root: Path) -> list[str]:
    """The overrides of a run of about a second."""
    return [
        "model=hf",
        f"model.path={workshop / 'model'}",
        "calibration=text",
        f"calibration.path={workshop / 'text.txt'}",
        "calibration.sequences=4",
        "calibration.length=16",
        "evaluate=text",
        f"evaluate.path={workshop / 'held' / 'text.txt'}",
        "evaluate.length=32",
        "evaluate.max_tokens=128",
        "tracking=none",
        f"output_root={output_root}",
    ]


def launch(*arguments: object, cwd: Path | None = None, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """What launch.py does and says, without the seconds that its imports take."""
    return forks.run(ROOT / "launch.py", *arguments, cwd=cwd, threads=threads)


def launch_anew(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """What launch.py does and says as a user starts it: an interpreter and imports of its own, two threads."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **kwargs)
