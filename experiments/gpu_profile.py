"""Where the time of pruning goes on a GPU: stages, kernels, launches and waits, for a block or two of LLaMA-7B's shape.

    python experiments/gpu_profile.py                               # less than a minute on an H200
    python experiments/gpu_profile.py --methods sparsegpt --blocks 1 --activations host
    python experiments/gpu_profile.py --dry-run                     # a tiny model, anywhere

Each method runs once without the profiler, which gives its seconds by stage and its peak memory, and once with it.
Everything is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout, which need not be installed
sys.path.insert(0, str(Path(__file__).parent))
from bench_prune import METHODS, SIZES, llama, method_of, two_forward_passes

DEFAULT = ["entropy + esparse", "sparsegpt", "obs"]
KERNELS, OPERATIONS = 25, 15
COUNTED = ("cudaLaunchKernel", "cuLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaDeviceSynchronize")


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pruned(name: str, model: Any, tokens_SL: Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Prunes the model; seconds by stage, with the device's queue empty at the edges, and of what is between stages."""
    from esparse.models.blocks import BlockModel
    from esparse.models.offload import HiddenStateStore
    from esparse.pruning.prune import prune
    from esparse.records.report import Stages

    method = method_of(METHODS[name])
    stages = Stages(settle)
    settle()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = BlockModel(
        model, device=device, batch_tokens=arguments.batch_tokens, hidden_store=HiddenStateStore(arguments.activations)
    )
    settle()
    began = time.perf_counter()
    prune(blocks, tokens_SL, method, stages=stages)
    settle()
    end = time.perf_counter()
    rest = end - began - sum(stages.seconds.values())
    return {"begin": began - start} | stages.seconds | {"between": rest, "all": end - start}


def show(found: Any) -> None:
    """What the profiler found, by kernels and by operations of the host."""
    events = found.key_averages()
    of_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    of_device.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in of_device)
    print(f"  the device is at work for {total / 1e6:.3f} s, in {sum(e.count for e in of_device)} kernels and copies")
    for event in of_device[:KERNELS]:
        print(f"  {event.self_device_time_total / 1e3:9.2f} ms {event.count:7d} x  {event.key[:90]}")
    of_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    print("  " + ", ".join(f"{e.key} {e.count}" for e in of_host if e.key.startswith(COUNTED)) + "; host, own time:")
    for event in sorted(of_host, key=lambda e: -e.self_cpu_time_total)[:OPERATIONS]:
        print(f"  {event.self_cpu_time_total / 1e3:9.2f} ms {event.count:7d} x  {event.key[:90]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=DEFAULT, metavar="METHOD")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--activations", choices=["host", "device"], default="device")
    parser.add_argument("--plain", action="store_true", help="without the profiler: seconds and memory alone")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    size, dtype = "7b", torch.bfloat16
    if arguments.dry_run:
        size, dtype = "warm", torch.float32
        arguments.sequences, arguments.length, arguments.batch_tokens = 4, 64, 128
    shape = f"{size}-profiled"  # whose beginning says how wide heads are
    SIZES[shape] = (*SIZES[size][:2], arguments.blocks, SIZES[size][3])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    model = llama(shape, arguments.length, dtype)
    warm = llama("warm", 64, dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    print(f"model made in {time.perf_counter() - start:.1f} s", flush=True)
    seeded = torch.Generator().manual_seed(1)
    tokens_SL = torch.randint(1, SIZES[size][3], (arguments.sequences, arguments.length), generator=seeded)
    for _ in range(2):  # the first time pays for libraries and memory
        settle()
        start = time.perf_counter()
        two_forward_passes(model, tokens_SL, device, arguments.batch_tokens, arguments.activations)
        settle()
        print(f"two forward passes {time.perf_counter() - start:.2f} s", flush=True)
    for name in arguments.methods:
        pruned(name, warm, torch.arange(1, 129).view(2, 64) % SIZES["warm"][3], arguments)
        model.load_state_dict(weights)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = pruned(name, model, tokens_SL, arguments)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        print(f"\n{name}: " + " ".join(f"{stage} {s:.2f}" for stage, s in seconds.items()) + f", {peak:.1f} GiB")
        if arguments.plain:
            continue
        model.load_state_dict(weights)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as found:
            seconds = pruned(name, model, tokens_SL, arguments)
        print("  with the profiler: " + " ".join(f"{s} {x:.2f}" for s, x in seconds.items()), flush=True)
        show(found)


if __name__ == "__main__":
    main()
