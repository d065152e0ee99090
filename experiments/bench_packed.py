"""Claims that packing a 4096 x 11008 layer takes under 2 s on 2 cores, and that a packed model takes less memory.

    python experiments/bench_packed.py                   # codec, then memory and time of a model of 0.2 B parameters
    python experiments/bench_packed.py --blocks 8
    python experiments/bench_packed.py --only codec
    python experiments/bench_packed.py --only decode     # one token from values and codes, as ratios: a minute

First the codec in bfloat16, the best of three rounds: seconds, and in brackets those of all cores together, which say
more where other jobs are running. Then a LLaMA with random weights is pruned and packed with `python launch.py`, and
the dense and the packed checkpoint are loaded by a process each, which says what it has in memory beyond what the
libraries take (resident set, and of it what is no file) and how long a forward pass takes.
`decode` times one token through a layer of LLaMA-7B's width on one thread: dense 16-bit weights (PyTorch), packed ones,
and codes. All ways take turns; the time is the thread's own (what it computed, not what it waited for), the least of
all rounds. Only ratios within one run mean anything. Beside each stands the ratio of the bytes, which a product bound
by memory would reach.
Cost: five minutes on two cores, and the disk space of the model twice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import esparse  # noqa: E402
from esparse import patterns  # noqa: E402
from esparse.kernels.form import packed_bits  # noqa: E402
from esparse.models.load import BUILTIN  # noqa: E402
from esparse.packed import grid_sizes, quantised_layer  # noqa: E402
from esparse.packed.layer import multiply  # noqa: E402
from esparse.packed.matrix import from_file, pack, to_file  # noqa: E402
from esparse.packed.quantised import QuantisedMatrix  # noqa: E402
from esparse.quantise.grids import Grid  # noqa: E402

LAYER = (4096, 11008)
CODED = [("2:4", None), ("4:8", None), ("8:16", None), ("16:32", None), ("8:16", "16:256")]
# The name, the pattern, and what kept values are rounded to.
DECODED = [("dense", "dense", None), ("2:4", "2:4", None), ("8:16", "8:16", None)]
DECODED += [(f"{p} + {q}", p, q) for p in ("2:4", "8:16", "dense") for q in ("int8", "int4", "int3", "nf4", "fp8")]

# Loads a small model of the same kind first: what the libraries take is no part of what a model takes.
MEASURE = """
import gc, json, statistics, sys, time
import esparse, torch
from transformers import AutoModelForCausalLM

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon", "VmHWM")}

def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)

def forward(model, tokens):
    ids = torch.randint(4, 1000, (1, tokens))
    start = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start

small = load(sys.argv[2])
for tokens in (1, 16, 64, 256):
    forward(small, tokens)
del small
gc.collect()
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak begins anew
out = {"before": resident()}
model = load(sys.argv[1])
out |= {"dtype": str(model.dtype), "loaded": resident()}
for tokens in map(int, sys.argv[3].split(",")):
    out[f"seconds_{tokens}"] = statistics.median([forward(model, tokens) for _ in range(6)][1:])
    if tokens == 1:
        out["decoded"] = resident()
out["after"] = resident()
print("MEASURED", json.dumps(out))
"""
TOKENS = (1, 4, 16, 64, 512)


def best(work: Callable[[], object]) -> str:
    """Seconds on the clock, and of all cores together."""
    times = []
    for _ in range(3):
        start, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    return "{:5.2f} ({:5.2f})".format(*map(min, zip(*times, strict=True)))


def codec() -> None:
    print(
        f"codec, {LAYER[0]} x {LAYER[1]} bfloat16, {torch.get_num_threads()} threads, seconds (of all cores), best of 3"
    )
    for asked in CODED:
        pattern = patterns.parse(*asked)
        weight_OI = torch.randn(LAYER, generator=torch.Generator().manual_seed(0))
        weight_OI = weight_OI.masked_fill_(~pattern.keep_top(weight_OI.abs()), 0.0).bfloat16()
        tensors = to_file(pack(weight_OI, pattern))
        assert torch.equal(from_file(tensors, pattern, LAYER[1]).dense(), weight_OI)
        encode = best(lambda w=weight_OI, p=pattern: to_file(pack(w, p)))  # type: ignore[misc]
        decode = best(lambda t=tensors, p=pattern: from_file(t, p, LAYER[1]))  # type: ignore[misc]
        bits = 8 * sum(v.nbytes for name, v in tensors.items() if name.endswith("index")) / weight_OI.numel()
        print(f"  {pattern!s:14} to disk {encode}   from disk {decode}   index {bits} bits per weight")


def decode() -> None:
    torch.set_num_threads(1)
    outputs, inputs, rounds = LAYER[1] // 2, LAYER[0], 15
    x_TI = torch.randn(1, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    ways: dict[str, tuple[int, Callable[[], object]]] = {}
    for name, asked, quantise in DECODED:
        pattern = patterns.parse(asked)
        generator = torch.Generator().manual_seed(1)
        weight_OI = torch.randn(outputs, inputs, generator=generator).bfloat16()
        if name == "dense":
            ways[name] = (weight_OI.nbytes, lambda w=weight_OI: torch.nn.functional.linear(x_TI, w))  # type: ignore[misc]
        elif quantise is None:
            packed = pack(weight_OI.masked_fill(~pattern.keep_top(weight_OI.abs().float()), 0.0), pattern)
            ways[name] = (packed.nbytes, lambda p=packed: multiply(p, x_TI, None))  # type: ignore[misc]
        else:
            codes = random_codes(pattern, outputs, inputs, esparse.option("quantise", quantise))
            ways[name] = (codes.nbytes, lambda c=codes: quantised_layer.multiply(c, x_TI, None))  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (_, product) in ways.items():
            start = time.thread_time()
            product()
            times[name].append(time.thread_time() - start)
    dense_bytes, dense_time = ways["dense"][0], min(times["dense"])
    print(
        f"decode, {outputs} x {inputs}, one token, one thread, least of {rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    for name, (size, _) in ways.items():
        ratio, limit = dense_time / min(times[name]), dense_bytes / size
        print(f"  {name:14} {ratio:5.2f} times dense   bytes {limit:5.2f}   share of the limit {ratio / limit:4.2f}")


def random_codes(pattern: patterns.Pattern, outputs: int, inputs: int, grid: Grid) -> QuantisedMatrix:
    """A quantised matrix of any values: rounding one would take minutes."""
    shapes, seeded = grid_sizes.file_shapes(pattern, outputs, inputs, grid), torch.Generator().manual_seed(2)
    keep_OI = pattern.keep_top(torch.rand(outputs, inputs, generator=seeded)) if pattern.parts() else None
    scale_OG = torch.full((outputs, inputs // grid.columns(inputs)), 0.01, dtype=getattr(torch, grid.scale))
    codes_OB = torch.randint(256, shapes["codes"], dtype=torch.uint8, generator=seeded)
    bits_OB = None if keep_OI is None else packed_bits(keep_OI)
    return QuantisedMatrix(pattern, inputs, grid, codes_OB, scale_OG.view(torch.uint8), bits_OB=bits_OB)


def model(blocks: int, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder / "dense")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    common = ["metric=magnitude", "shuffle=none", "evaluate=none", "calibration.sequences=1", "calibration.length=64"]
    common += ["tracking=none", f"output_root={folder / 'out'}", "export=packed"]
    for model_is, place in ((["model=hf", f"model.path={folder / 'dense'}"], "packed"), (["model=tiny"], "small")):
        command = [sys.executable, "launch.py", *model_is, *common, f"export.path={folder / place}"]
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
    found = {}
    for which, small in (("dense", BUILTIN), ("packed", folder / "small")):
        command = [sys.executable, "-c", MEASURE, str(folder / which), str(small), ",".join(map(str, TOKENS))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found[which] = json.loads(done.stdout.partition("MEASURED")[2])
        size = sum(file.stat().st_size for file in (folder / which).glob("*.safetensors"))
        of, start = found[which], found[which]["before"]
        more = {when: of[when]["VmRSS"] - start["VmRSS"] for when in ("loaded", "decoded", "after")}
        print(
            f"{which:7} files {size / 2**20:5.0f} MiB   resident, above {start['VmRSS']:.0f} MiB of libraries: "
            f"loaded {more['loaded']:5.0f} (peak {of['loaded']['VmHWM'] - start['VmRSS']:5.0f}, of no file "
            f"{of['loaded']['RssAnon'] - start['RssAnon']:5.0f}), after a token {more['decoded']:5.0f}, "
            f"after all {more['after']:5.0f}   {of['dtype']}"
        )
    for tokens in TOKENS:
        dense, packed = (found[which][f"seconds_{tokens}"] for which in ("dense", "packed"))
        print(f"{tokens:4} tokens: dense {dense:.4f} s, packed {packed:.4f} s, {packed / dense:.2f} times as long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--only", choices=("codec", "model", "decode"))
    asked = parser.parse_args()
    if asked.only == "decode":
        decode()
        return
    if asked.only != "model":
        codec()
    if asked.only == "codec":
        return
    with tempfile.TemporaryDirectory() as folder:
        model(asked.blocks, Path(folder))


if __name__ == "__main__":
    main()
