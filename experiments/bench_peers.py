"""Claims that esparse prunes a real model in fewer seconds than its peers do, on the same tokens, in less memory.

    python experiments/bench_peers.py --model NAME_OR_DIR --text FILE [--compressor PYTHON] [--rounds 3]

Three programs prune to 2:4 in turns (A B C A B C), a process each: esparse; the arithmetic of the papers' scripts as
plain loops (bench_prune.py); and llm-compressor 0.14, whose Python `--compressor` names (`python -m venv DIR`,
`DIR/bin/pip install llmcompressor torch==VERSION` with the version that esparse has). Each loads the model itself. The
seconds are those of pruning alone, by the processor's time of all threads and by the clock; the memory is the process's
peak, and what it was with the model loaded. The last column says which share of all choices to keep or to drop is
esparse's. One small model of two blocks is pruned before, so that nobody pays for compiled loops or first imports.
Cost for SmolLM2-135M: 2 minutes a round and program with Wanda on one thread, 3 with SparseGPT.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

METHODS = ("wanda", "sparsegpt")
PROGRAMS = ("esparse", "plain loops", "llm-compressor")
WARM = 2  # blocks of the model that is pruned before


def by_esparse(model: Any, tokens_SL: Tensor, method: str) -> None:
    import esparse

    esparse.prune(model, None, "2:4", metric=method, calibration=tokens_SL, progress=False)


def by_plain_loops(model: Any, tokens_SL: Tensor, method: str) -> None:
    from experiments import bench_prune

    way = {"wanda": bench_prune.plain_wanda, "sparsegpt": bench_prune.plain_sparsegpt}[method]
    way(model, tokens_SL, torch.device("cpu"), tokens_SL.shape[1], "host")


def by_compressor(model: Any, tokens_SL: Tensor, method: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    sequences, length = tokens_SL.shape
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens_SL.tolist(), "attention_mask": [[1] * length] * sequences}),
        recipe=[modifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])],
        max_seq_length=length,
        num_calibration_samples=sequences,
        shuffle_calibration_samples=False,
    )


WAYS: dict[str, Callable[[Any, Tensor, str], None]] = dict(
    zip(PROGRAMS, (by_esparse, by_plain_loops, by_compressor), strict=True)
)


def one(settings: dict[str, Any]) -> dict[str, Any]:
    """Prunes in this process; the keep masks are written beside the tokens."""
    from transformers import AutoModelForCausalLM

    folder, way = Path(settings["folder"]), WAYS[settings["program"]]
    tokens_SL = torch.load(folder / "tokens.pt")

    def loaded(blocks: int | None = None) -> Any:
        smaller = {} if blocks is None else {"num_hidden_layers": blocks}
        path, dtype = settings["model"], getattr(torch, settings["dtype"])
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **smaller).eval()

    way(loaded(WARM), tokens_SL[:2, :64], settings["method"])
    model = loaded()
    before = _peak_mib()
    clock, spent = time.perf_counter(), time.process_time()
    way(model, tokens_SL, settings["method"])
    result = {"cpu": time.process_time() - spent, "wall": time.perf_counter() - clock}
    result |= {"peak_mib": _peak_mib(), "loaded_mib": before, "threads": torch.get_num_threads()}
    ending = "_proj.weight"  # q, k, v, o, gate, up, down of a LLaMA
    torch.save({n: p != 0 for n, p in model.state_dict().items() if n.endswith(ending)}, folder / settings["masks"])
    return result


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def in_own_process(python: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What one run measured, and its masks; RuntimeError if it failed."""
    settings = settings | {"masks": "masks.pt"}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, __file__, "--one", json.dumps(settings)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{settings['program']} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["masks"] = torch.load(Path(settings["folder"]) / settings["masks"])
    print(f"{settings['method']}, {settings['program']}: {result['cpu']:.0f} CPU seconds", file=sys.stderr, flush=True)
    return result


def agreement(masks: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The share of all choices that are the same."""
    same = sum(int((masks[name] == others[name]).sum()) for name in masks)
    return same / sum(mask.numel() for mask in masks.values())


def compared(arguments: argparse.Namespace, pythons: dict[str, str], folder: str) -> list[dict[str, Any]]:
    """A row per method and program: medians, and esparse's as a share of them, round by round."""
    rows = []
    base = {"model": arguments.model, "dtype": arguments.dtype, "folder": folder}
    for method in arguments.methods:
        runs: dict[str, list[dict[str, Any]]] = {program: [] for program in pythons}
        for _ in range(arguments.rounds):
            for program, python in pythons.items():
                runs[program].append(in_own_process(python, base | {"method": method, "program": program}))
        ours = runs["esparse"]
        for program, theirs in runs.items():
            row: dict[str, Any] = {"method": method, "program": program, "threads": theirs[0]["threads"]}
            for key in ("cpu", "wall", "peak_mib", "loaded_mib"):
                row[key] = [run[key] for run in theirs]
            row["same"] = agreement(ours[0]["masks"], theirs[0]["masks"])
            row["times"] = [their["cpu"] / our["cpu"] for their, our in zip(theirs, ours, strict=True)]
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaMA-shaped model")
    parser.add_argument("--text", type=Path, help="calibration text, one file")
    parser.add_argument("--compressor", metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one)))
        return
    if not arguments.model or not arguments.text:
        parser.error("--model and --text are needed")
    from transformers import AutoTokenizer

    from esparse.data.calibration import Calibration  # the tokens that esparse would take itself

    sequences, length = arguments.sequences, arguments.length
    settings = Calibration(corpus="text", path=str(arguments.text), sequences=sequences, length=length, seed=0)
    tokens_SL = settings.sample(AutoTokenizer.from_pretrained(arguments.model), longest=length)
    pythons = {"esparse": sys.executable, "plain loops": sys.executable}
    if arguments.compressor:
        pythons["llm-compressor"] = arguments.compressor
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tokens_SL, Path(folder) / "tokens.pt")
        rows = compared(arguments, pythons, folder)
    print("| method | program | CPU seconds | clock | times esparse's CPU | peak MiB | with the model loaded | same |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cpu, wall, peak, loaded = (statistics.median(row[key]) for key in ("cpu", "wall", "peak_mib", "loaded_mib"))
        times = f"{statistics.median(row['times']):.2f} ({min(row['times']):.2f} to {max(row['times']):.2f})"
        said = f"| {row['method']} | {row['program']} | {cpu:.0f} | {wall:.0f} | {times} | {peak:.0f} | {loaded:.0f} "
        print(f"{said}| {row['same']:.2%} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
