"""All that a GPU can say about esparse, in one call of under nine minutes: tests, products, the whole model, pruning.

    python experiments/gpu.py                       # writes experiments/results/gpu-DEVICE-DATE.json
    python experiments/gpu.py --parts decode model  # only some of it
    python experiments/gpu.py --dry-run             # the same steps with tiny shapes on a CPU: tries the script alone

Every part runs in a process of its own with a time of its own; what a part leaves over the next ones may use. Each
measurement is in the file as soon as it is made, so that a machine that is taken away loses nothing, and what fails is
in it too. Exit code 1: no GPU, or a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
TOTAL_S = 525.0
# Hidden states wait on the GPU, or on the host. The first forward passes warm up; the last ones are the floor.
FLOOR = "two forward passes"
METHODS = [FLOOR, "wanda", "entropy", "entropy + esparse", "obs", "sparsegpt", FLOOR]
PRUNED = [(name, "device") for name in METHODS] + [(name, "host") for name in (FLOOR, "entropy + esparse", "sparsegpt")]


@dataclass(frozen=True, slots=True)
class Part:
    """A process, and how many seconds it is given; each JSON object that it prints on a line of its own is a result."""

    name: str
    seconds: float
    command: list[str]


def parts(*, dry_run: bool) -> list[Part]:
    """In the order in which they matter."""
    me = [sys.executable, str(Path(__file__).resolve()), *(["--dry-run"] if dry_run else []), "--part"]
    workers = str(min(8, os.cpu_count() or 1))
    tests = ["-m", "pytest", "-m", "gpu", "-n", workers, "--dist", "load", "-p", "no:cacheprovider", "-q"]
    folders = [
        "tests/kernels",
        "tests/shuffles",
        "tests/updates",
        "tests/stats",
    ]  # not all that the others import is there
    tests = [*tests[:4], "--collect-only", "-n", "0", "-q"] if dry_run else tests
    return [
        Part("environment", 25, [*me, "environment"]),
        Part("tests", 80, [sys.executable, *tests, *folders]),
        Part("decode", 80, [*me, "decode"]),
        Part("prune", 70, [*me, "prune"]),
        Part("model", 60, [*me, "model"]),
        Part("prefill", 40, [*me, "prefill"]),
        Part("larger", 60, [*me, "larger"]),
    ]


class Results:
    """The file; whole after every addition."""

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path, self.content = path, {**facts, "parts": {}}
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.path)


def carry_out(part: Part, seconds: float, results: Results) -> bool:
    """Runs a part for at most so long; True where it ended well. Its last lines of text are kept where it did not."""
    kept: dict[str, Any] = {"status": "running", "given_s": round(seconds, 1), "rows": []}
    results.content["parts"][part.name] = kept
    results.write()
    start, said = time.monotonic(), []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its own children end with it
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            kept["rows"].append(row)
            results.write()
        elif line.strip():
            said = [*said[-30:], line.rstrip().replace(str(ROOT), ".")]  # the file travels, the folder does not
    code = process.wait()
    timer.cancel()
    kept["seconds"] = round(time.monotonic() - start, 1)
    kept["status"] = "out of time" if late.is_set() else "ok" if code == 0 else f"failed with {code}"
    if part.name == "tests" or code != 0:
        kept["said"] = said
    results.write()
    return code == 0 and not late.is_set()


def carry_out_all(wanted: Sequence[Part], results: Results, total_s: float) -> bool:
    """All parts, one after the other, within a total time."""
    end, well, given = time.monotonic() + total_s, True, 0.0
    for part in wanted:
        given += part.seconds
        left = end - time.monotonic()
        if left < 5:
            results.content["parts"][part.name] = {"status": "no time was left", "rows": []}
            results.write()
            well = False
            continue
        # What the parts before it did not take is added to its own.
        own = max(part.seconds, given - (total_s - left))
        fine = carry_out(part, min(own, left), results)
        status = results.content["parts"][part.name]
        print(f"{part.name:<28} {status['status']:<16} {status['seconds']:7.1f} s", flush=True)
        well = well and fine
    return well


# --- the parts; each prints a JSON object per line ---


def say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def environment(*, dry_run: bool) -> None:
    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "hydra"):
        facts[name] = getattr(__import__(name), "__version__", "?") if find_spec(name) else None
    if not dry_run:
        from esparse.bench.search import library_version
        from esparse.kernels.form import to_form
        from esparse.kernels.linear import compress, shared_values

        say(facts)
        device = torch.cuda.get_device_properties(0)
        weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
        keep = torch.tensor([True, False, False, True], device="cuda").repeat(256, 128)
        values, _ = to_form(weight, keep)
        facts["cusparselt_compiled"] = torch.backends.cusparselt.version()
        shared = shared_values(values, compress(torch.where(keep, weight, 0.0)))
        facts |= {
            "gpu": device.name,
            "capability": [device.major, device.minor],
            "multiprocessors": device.multi_processor_count,
            "l2_bytes": device.L2_cache_size,
            "memory_bytes": device.total_memory,
            "cuda": torch.version.cuda,
            "cusparselt_loaded": library_version(),
            # whether cuSPARSELt's blob begins with the kept weights' values, so that one copy of them serves both
            "values_are_shared": shared is not None,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        facts["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    say(facts)


def products(
    shapes: list[str], tokens: list[int], patterns: list[tuple[int, int]], kernels: list[str], *, dry_run: bool
) -> None:
    """Rows of `bench=gemm`."""
    import torch

    from esparse.bench.gemm import Gemm
    from esparse.bench.search import Algorithms
    from esparse.bench.timing import CudaClock, WallClock
    from esparse.patterns import NM

    if dry_run:
        from esparse.bench import LayerShape
        from esparse.bench import shapes as named

        named.NAMED |= {name: [LayerShape("q_proj", 64, 96), LayerShape("up_proj", 96, 64)] for name in shapes}
    device = torch.device("cpu" if dry_run else "cuda")
    bench = Gemm(
        shapes=shapes,
        tokens=tokens,
        dtypes=["float32"] if dry_run else ["bfloat16"],
        kernels=kernels,
        warm_up=3,
        repeats=3 if dry_run else 20,
        least_ms=0.1 if dry_run else 2.0,
        graph_below_ms=5.0,  # cuSPARSELt makes a plan at each call, 0.6 ms on the host
        cache="",
    )
    cache = Path(os.environ.get("ESPARSE_ALGORITHMS", RESULTS / "algorithms.json"))
    algorithms = Algorithms(cache, "cpu", "none") if dry_run else Algorithms.of(device, cache)
    clock = WallClock() if dry_run else CudaClock(device)
    for n, m in patterns:
        size = 64 if dry_run else 8192
        measured = bench.measure([], NM(n, m), device, clock, algorithms, limit_size=size, on_row=say)
        say({"limits": measured.limits})


def model(*, dry_run: bool) -> None:
    """Rows of `bench=model`: blocks of LLaMA-7B's shape with random weights at 2:4, each input group in an order."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from esparse.bench import Subject
    from esparse.bench.model import ModelBench
    from esparse.bench.search import Algorithms
    from esparse.bench.timing import CudaClock, WallClock
    from esparse.patterns import NM, Grouping

    device = torch.device("cpu" if dry_run else "cuda")
    hidden, inner, heads, blocks = (64, 96, 2, 1) if dry_run else (4096, 11008, 32, 8)
    config = LlamaConfig(
        vocab_size=32 if dry_run else 32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
    )
    torch.set_default_dtype(torch.float32 if dry_run else torch.bfloat16)
    with device:
        made = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    cache = Path(os.environ.get("ESPARSE_ALGORITHMS", RESULTS / "algorithms.json"))
    algorithms = Algorithms(cache, "cpu", "none") if dry_run else Algorithms.of(device, cache)
    clock = WallClock() if dry_run else CudaClock(device)
    bench = ModelBench(
        prompt=8 if dry_run else 128,
        batches=[1] if dry_run else [1, 8, 16],
        warm_up=2,
        repeats=2 if dry_run else 20,
        least_ms=1.0 if dry_run else 5.0,
        graph_below_ms=1000.0,
        cache="",
    )
    for shuffled in (False, True):
        keeps, orders, shared = {}, {}, {}
        for name, layer in made.named_modules():
            if isinstance(layer, torch.nn.Linear) and "layers." in name:
                parent, _, last = name.rpartition(".")
                group = f"{parent} {'out' if last in ('o_proj', 'down_proj') else 'in'}"
                if shuffled:
                    orders[f"{name}.weight"] = shared.setdefault(group, torch.randperm(layer.in_features))
                grouping = Grouping(NM(2, 4), orders[f"{name}.weight"].to(device) if shuffled else None)
                keep = grouping.keep_top(layer.weight.data.float().abs())
                if not shuffled:
                    torch.manual_seed(0)
                layer.weight.data = torch.where(keep, torch.randn_like(layer.weight.data) * 0.02, 0.0)
                keeps[f"{name}.weight"] = keep.cpu()
        subject = Subject(made, [], keeps, orders, NM(2, 4), device)
        measured = bench.measure(subject, clock, algorithms)
        for row in measured.rows:
            say(row | {"shuffled": shuffled, "blocks": blocks})
        say({"bytes": measured.limits, "shuffled": shuffled})


def prune(*, dry_run: bool) -> None:
    """Methods of bench_prune.py: four blocks of LLaMA-7B's shape, 128 x 2048 tokens."""
    settings: dict[str, Any] = {"size": "7b-4", "warm": "7b-1", "sequences": 128, "length": 2048}
    settings |= {"dtype": "bfloat16", "batch_tokens": 16384}
    if dry_run:
        settings |= {"size": "10m", "warm": "10m", "sequences": 2, "length": 16, "dtype": "float32"}
    sys.path.insert(0, str(Path(__file__).parent))
    from bench_prune import one_after_the_other  # type: ignore[import-not-found]

    for row in one_after_the_other(settings, PRUNED):
        say(settings | row)


DECODE = ["packed", "packed_gather", "cusparselt", "cusparselt_default"]
PREFILL = ["cusparselt", "cusparselt_default", "decode"]


def run_part(name: str, *, dry_run: bool) -> None:
    run: Callable[..., None] = {
        "environment": environment,
        "decode": partial(products, ["llama-7b"], [1, 4, 16, 64], [(2, 4), (8, 16)], DECODE),
        "prefill": partial(products, ["llama-7b"], [64, 512, 2048, 8192], [(2, 4)], PREFILL),
        "prune": prune,
        "model": model,
        "larger": partial(products, ["llama-13b", "llama-65b"], [1, 2048], [(2, 4)], [*DECODE[:1], *PREFILL[:1]]),
    }[name]
    run(dry_run=dry_run)


def summary(results: Results) -> str:
    """What a person wants to see first."""
    lines = [
        "",
        f"{'layer':<30} {'tokens':>6} {'pattern':>7} {'kernel':<19} {'dense ms':>9} {'ms':>9} {'x':>5} {'limit':>6}",
    ]
    for part in results.content["parts"].values():
        for row in part["rows"]:
            if row.get("why_not"):
                lines.append(
                    f"{row['layer']:<30} {row['tokens']:>6} {row['pattern']:>7} {row['kernel']:<19} {row['why_not']}"
                )
            elif "speedup" in row:
                label = f"{row['phase']} x {row['sequences']}" if "phase" in row else row["layer"]
                limit = f"{row['limit_speedup']:6.2f}" if "limit_speedup" in row else ""
                lines.append(
                    f"{label:<30} {row['tokens']:>6} {row.get('pattern', ''):>7} {row['kernel']:<19} "
                    f"{row['dense_ms']:9.4f} {row['sparse_ms']:9.4f} {row['speedup']:5.2f} {limit}"
                )
            elif "method" in row:
                where = f"prune {row['method']}, hidden states on the {row['activations']}"
                lines.append(f"{where:<60} {row['seconds']:8.2f} s {row['device_mib'] or 0:8.0f} MiB on the device")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", metavar="PART", help="default: all")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for everything")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the file goes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        run_part(asked.part, dry_run=asked.dry_run)
        return 0
    import torch

    if not asked.dry_run and not torch.cuda.is_available():
        print("gpu.py measures a GPU, and PyTorch sees none here (--dry-run tries the script itself)", file=sys.stderr)
        return 1
    wanted = parts(dry_run=asked.dry_run)
    if asked.parts:
        wanted = [part for part in wanted if part.name in asked.parts]
        if not wanted:
            print(f"no part is called {' or '.join(asked.parts)}", file=sys.stderr)
            return 2
    device = "dry-run" if asked.dry_run else torch.cuda.get_device_name().replace(" ", "-")
    date = time.strftime("%Y-%m-%d")
    path = asked.out / f"gpu-{device}-{date}.json"
    commit = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    results = Results(path, device=device, date=date, started=time.strftime("%H:%M:%S"), commit=commit or None)
    os.environ.setdefault("ESPARSE_ALGORITHMS", str(asked.out / "algorithms.json"))
    well = carry_out_all(wanted, results, asked.seconds)
    print(summary(results))
    print(f"\n{path}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
