"""Claims that a model larger than the memory that a process may take is pruned and measured.

    python experiments/bench_memory.py                        # 1.9 B parameters in bfloat16, 3.8 GB; a limit of 3 GB
    python experiments/bench_memory.py --blocks 8 --limit-gb 2.5

Writes a LLaMA with random weights to a temporary folder, shard by shard, and prunes it with `python launch.py` under
`ulimit -v`, which the system enforces on every byte of addresses, libraries included. Prints what the system says was
the most that the process had in memory (maximum resident set). Then the same with model.store=memory, which has to end
in one sentence. Cost: five minutes on two cores, and the disk space of the model twice.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

ROOT = Path(__file__).parent.parent
HIDDEN, INNER, VOCABULARY = 2560, 6912, 4096


def write_model(folder: Path, blocks: int) -> int:
    """A checkpoint with one shard per block and one for the rest; returns its bytes."""
    sys.path.insert(0, str(ROOT))
    from esparse.models.load import BUILTIN

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HIDDEN // 128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == blocks
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    seeded = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    size = 0

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal size
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (0.02 * torch.randn(shape, generator=seeded)).bfloat16()
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
        size += sum(tensor.nbytes for tensor in tensors.values())

    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shard("model-ends.safetensors", ends | {"model.norm.weight": (HIDDEN,)})
    for index in range(blocks):
        block = {f"self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        block |= {f"mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        block |= {"mlp.down_proj.weight": (HIDDEN, INNER)}
        block |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
        shard(f"model-{index:03}.safetensors", {f"model.layers.{index}.{key}": shape for key, shape in block.items()})
    index_file = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return size


def attempt(model: Path, out: Path, limit: int, store: str) -> None:
    """One run under the limit, and what the system says about it."""
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "model=hf",
        f"model.path={model}",
        f"model.store={store}",
        "model.devices=cpu",
        "metric=wanda",
        "shuffle=gns",
        "calibration.sequences=8",
        "calibration.length=64",
        "evaluate.length=64",
        "evaluate.max_tokens=256",
        "tracking=none",
        f"output_root={out / store}",
    ]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    start = time.perf_counter()
    with (out / f"{store}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=limited)
        # Of this one process; the next one's figure does not hide behind it.
        _, status, usage = os.wait4(process.pid, 0)
    print(
        f"model.store={store}: exit code {status >> 8}, peak resident {usage.ru_maxrss * 1024 / 1e9:.2f} GB, "
        f"{time.perf_counter() - start:.0f} s"
    )
    print("  " + (out / f"{store}.log").read_text().strip().splitlines()[-1][:300])
    for record in (out / store).glob("*/result.json"):
        content = json.loads(record.read_text())
        print(f"  density {content['sparsity']['density']}, pattern holds: {content['sparsity']['pattern_holds']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--limit-gb", type=float, default=3.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_model(Path(folder) / "model", arguments.blocks)
        print(f"weights {size / 1e9:.2f} GB, limit of the process (ulimit -v) {arguments.limit_gb:.2f} GB")
        for store in ("shards", "memory"):
            attempt(Path(folder) / "model", Path(folder), int(arguments.limit_gb * 1e9), store)


if __name__ == "__main__":
    main()
