"""Claims that a run costs little more than the two forward passes of the calibration tokens that any such method needs.

    python experiments/bench_prune.py                                # the table: LLaMA shape, 110 M, 32 x 512 tokens
    python experiments/bench_prune.py --size 7b --dtype bfloat16 --sequences 128 --length 2048     # for a GPU
    python experiments/bench_prune.py --growth                       # seconds and memory against size and tokens

Every method runs in a process of its own on the same random weights and tokens, so that its peak memory is its own;
what is timed begins with the model in memory, after a tiny one was pruned (threads, caches, compiled loops), and ends
with the last block. The floor is the model's own forward pass through its blocks, twice: once to look at the dense
block, once with the pruned one. `plain wanda` and `plain sparsegpt` are written here as the papers' scripts work: hooks
on every linear layer, one sequence after the other, a Python loop over the groups or columns. Rounds are interleaved;
the table has the medians. Cost of the first table: ten minutes on two cores, of the growth six.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("size", "sequences", "length", "dtype", "batch_tokens", "activations")
MEASURED = {"seconds": "s", "host_mib": "MiB"}  # whose growth is shown, and its unit
STEPS = {"parameters": (10**6, "million"), "calibration tokens": (10**3, "thousand")}  # what it is shown against
# Hidden width, width of the MLP, blocks, vocabulary; heads of 64 (of 128 at 7b), embeddings tied.
SIZES = {
    "warm": (128, 256, 2, 128),
    "10m": (384, 1024, 5, 4096),
    "30m": (512, 1376, 9, 4096),
    "110m": (768, 2048, 12, 32000),
    "350m": (1024, 2816, 24, 32000),
    "7b": (4096, 11008, 32, 32000),
    "7b-1": (4096, 11008, 1, 32000),  # one block, and four: the time goes with their number
    "7b-4": (4096, 11008, 4, 32000),
}
METHODS = {
    "magnitude": ["metric=magnitude", "shuffle=none"],
    "wanda": ["metric=wanda", "shuffle=none"],
    "entropy": ["metric=entropy", "shuffle=none"],
    "entropy, fixed range": ["metric=entropy", "metric.range=fixed", "shuffle=none"],
    "entropy + gns": ["metric=entropy", "shuffle=gns"],
    "entropy + esparse": ["metric=entropy", "shuffle=esparse"],
    "obs": ["metric=wanda", "shuffle=none", "update=obs"],
    "sparsegpt": ["metric=sparsegpt", "shuffle=none"],
}
ALL = ["two forward passes", *METHODS, "plain wanda", "plain sparsegpt"]


def llama(size: str, length: int, dtype: torch.dtype) -> nn.Module:
    """A LLaMA with random weights, the same ones every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, blocks, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // (128 if size.startswith("7b") else 64),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    if torch.cuda.is_available():  # where billions of random numbers take no time
        torch.set_default_dtype(dtype)
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).cpu().eval()
        torch.set_default_dtype(torch.float32)
    else:
        model = LlamaForCausalLM(config).to(dtype).eval()
    for block in model.model.layers:  # as in trained models, channels differ in size
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data = (0.7 * torch.randn(hidden)).exp().to(dtype)
    return model


# --- what is timed: each takes the model, the tokens and the device, and prunes to 2:4 ---


@torch.inference_mode()
def two_forward_passes(
    model: Any, tokens_SL: Tensor, device: torch.device, batch_tokens: int, activations: str
) -> None:
    """The floor: blocks one after the other, every one over all tokens twice."""
    home = device if activations == "device" else torch.device("cpu")
    hidden, calls = _entered(model, tokens_SL, device, batch_tokens)
    hidden = [h.to(home) for h in hidden]
    for block in model.model.layers:
        block.to(device)
        for _ in range(2):
            out = [block(h.to(device), **calls[len(h)]).to(home) for h in hidden]
        hidden = out
        block.to("cpu")


@torch.inference_mode()
def plain_wanda(model: Any, tokens_SL: Tensor, device: torch.device, batch_tokens: int, activations: str) -> None:
    def prune(layer: nn.Linear, state: dict[str, Tensor]) -> None:
        metric_OI = layer.weight.abs() * state["row"].sqrt()
        drop_OI = torch.zeros_like(metric_OI, dtype=torch.bool)
        for first in range(0, metric_OI.shape[1], 4):
            lowest = metric_OI[:, first : first + 4].float().topk(2, dim=1, largest=False).indices
            drop_OI.scatter_(1, first + lowest, True)
        layer.weight[drop_OI] = 0

    def observe(state: dict[str, Tensor], x_TI: Tensor, seen: int) -> None:
        if not state:
            state["row"] = torch.zeros(x_TI.shape[1], device=x_TI.device)
        state["row"] *= seen / (seen + 1)
        state["row"] += x_TI.T.float().norm(dim=1) ** 2 / (seen + 1)

    _plain(model, tokens_SL, device, observe, prune)


@torch.inference_mode()
def plain_sparsegpt(model: Any, tokens_SL: Tensor, device: torch.device, batch_tokens: int, activations: str) -> None:
    def observe(state: dict[str, Tensor], x_TI: Tensor, seen: int) -> None:
        if not state:
            state["hessian"] = torch.zeros(x_TI.shape[1], x_TI.shape[1], device=x_TI.device)
        state["hessian"] *= seen / (seen + 1)
        x_IT = (2 / (seen + 1)) ** 0.5 * x_TI.T.float()
        state["hessian"] += x_IT @ x_IT.T

    def prune(layer: nn.Linear, state: dict[str, Tensor]) -> None:
        weight_OI, hessian_II = layer.weight.float().clone(), state["hessian"]
        dead_I = hessian_II.diagonal() == 0
        hessian_II[dead_I, dead_I] = 1
        weight_OI[:, dead_I] = 0
        hessian_II.diagonal().add_(0.01 * hessian_II.diagonal().mean())
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
        upper_II = torch.linalg.cholesky(inverse_II, upper=True)
        inputs = weight_OI.shape[1]
        for start in range(0, inputs, 128):
            end = min(start + 128, inputs)
            part, errors = weight_OI[:, start:end].clone(), torch.zeros_like(weight_OI[:, start:end])
            drop, own = torch.zeros_like(part, dtype=torch.bool), upper_II[start:end, start:end]
            for i in range(end - start):
                if i % 4 == 0:
                    score = part[:, i : i + 4] ** 2 / own.diagonal()[i : i + 4] ** 2
                    drop.scatter_(1, i + score.topk(2, dim=1, largest=False).indices, True)
                kept = part[:, i].clone()
                kept[drop[:, i]] = 0
                error = (part[:, i] - kept) / own[i, i]
                part[:, i:] -= error[:, None] * own[i, i:][None]
                part[:, i] = kept
                errors[:, i] = error
            weight_OI[:, start:end] = part
            weight_OI[:, end:] -= errors @ upper_II[start:end, end:]
        layer.weight.copy_(weight_OI)

    _plain(model, tokens_SL, device, observe, prune)


def _plain(
    model: Any,
    tokens_SL: Tensor,
    device: torch.device,
    observe: Callable[[dict[str, Tensor], Tensor, int], None],
    prune: Callable[[nn.Linear, dict[str, Tensor]], None],
) -> None:
    """The loop of the papers' scripts: a state for each linear layer, one sequence at a time, all on the device."""
    hidden, calls = _entered(model, tokens_SL, device, batch_tokens=1)
    hidden = [h.to(device) for h in hidden]
    for block in model.model.layers:
        block.to(device)
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        states: dict[nn.Module, dict[str, Tensor]] = {layer: {} for layer in layers}
        for seen, h in enumerate(hidden):

            def watch(layer: nn.Module, args: Any, states: Any = states, seen: int = seen) -> None:
                observe(states[layer], args[0].flatten(0, -2), seen)

            hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
            block(h, **calls[1])
            for hook in hooks:
                hook.remove()
        for layer in layers:
            prune(layer, states[layer])
        hidden = [block(h, **calls[1]) for h in hidden]
        block.to("cpu")


def _entered(
    model: Any, tokens_SL: Tensor, device: torch.device, batch_tokens: int
) -> tuple[list[Tensor], dict[int, dict[str, Any]]]:
    """The hidden states that enter the first block by micro-batch, and the blocks' arguments by sequences in one."""
    length = tokens_SL.shape[1]
    embed = model.model.embed_tokens.to(device)
    hidden = [embed(tokens_BL.to(device)) for tokens_BL in tokens_SL.split(max(1, batch_tokens // length))]
    positions = torch.arange(length, device=device)[None]
    angles = model.model.rotary_emb.to(device)(hidden[0].to(device), positions)
    # Without a mask, attention is causal.
    return hidden, {len(h): {"position_embeddings": angles, "position_ids": positions} for h in hidden}


def method_of(words: list[str]) -> Any:
    """The method of words such as metric=entropy, metric.range=fixed and shuffle=none at 2:4, without Hydra.

    The machines with a GPU that are lent to this project have no Hydra.
    """
    import esparse
    from esparse import patterns
    from esparse.api.method_parts import IMPLIED, NEUTRAL, parts_of
    from esparse.pruning.method import Method

    said = dict(word.split("=") for word in words)
    asked: dict[str, Any] = {"metric": None} | dict.fromkeys(NEUTRAL) | {"shuffle": IMPLIED, "update": IMPLIED}
    for group in [name for name in said if "." not in name]:
        changes = {name.partition(".")[2]: value for name, value in said.items() if name.startswith(f"{group}.")}
        asked[group] = esparse.option(group, said[group], **changes) if changes else said[group]
    parts, _ = parts_of(asked, 0)
    return Method(pattern=patterns.parse("2:4"), seed=0, **parts)


def esparse_run(overrides: list[str]) -> Callable[..., None]:
    """What `python launch.py` does between loading the model and measuring it."""
    from esparse.models.blocks import BlockModel
    from esparse.models.offload import HiddenStateStore
    from esparse.pruning.prune import prune
    from esparse.records.report import Stages

    method = method_of(overrides)

    def run(model: Any, tokens_SL: Tensor, device: torch.device, batch_tokens: int, activations: str) -> None:
        blocks = BlockModel(model, device=device, batch_tokens=batch_tokens, hidden_store=HiddenStateStore(activations))
        stages = Stages()
        prune(blocks, tokens_SL, method, stages=stages)
        print(" ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.seconds.items()), file=sys.stderr)

    return run


def one(settings: dict[str, Any]) -> dict[str, Any]:
    """Times one method in this process."""
    run = _way(settings["method"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length = settings["length"]
    model = llama(settings["size"], length, getattr(torch, settings["dtype"]))
    seeded = torch.Generator().manual_seed(1)
    tokens_SL = torch.randint(1, 4096, (settings["sequences"], length), generator=seeded)
    # Threads, caches, kernels and compiled loops, as a run of any length pays for them once.
    home = settings.get("activations", "host")
    run(llama("warm", 64, getattr(torch, settings["dtype"])), torch.arange(128).view(2, 64), device, 64, home)
    return _timed(run, model, tokens_SL, device, settings["batch_tokens"], home)


def one_after_the_other(settings: dict[str, Any], methods: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Times methods, each with the place of the hidden states, on copies of one model in this process.

    Each goes through one block of that shape first, so that no kernel is compiled in its time. What memory the host
    had at most is that of all methods so far.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, length = getattr(torch, settings["dtype"]), settings["length"]
    seeded = torch.Generator().manual_seed(1)
    tokens_SL = torch.randint(1, 4096, (settings["sequences"], length), generator=seeded)
    model, warm = llama(settings["size"], length, dtype), llama(settings["warm"], length, dtype)
    for method, home in methods:
        run, batch_tokens = _way(method), settings["batch_tokens"]
        run(copy.deepcopy(warm), tokens_SL[:16], device, batch_tokens, home)
        fresh = copy.deepcopy(model)
        yield {"method": method, "activations": home} | _timed(run, fresh, tokens_SL, device, batch_tokens, home)


def _way(method: str) -> Callable[..., None]:
    plain = {
        "two forward passes": two_forward_passes,
        "plain wanda": plain_wanda,
        "plain sparsegpt": plain_sparsegpt,
    }
    return plain.get(method) or esparse_run(METHODS[method])


def _timed(
    run: Callable[..., None], model: Any, tokens_SL: Tensor, device: torch.device, batch_tokens: int, home: str
) -> dict[str, Any]:
    before = _peak_host_mib()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run(model, tokens_SL, device, batch_tokens, home)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - start,
        "host_mib": _peak_host_mib(),
        "host_mib_before": before,
        "device_mib": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def _peak_host_mib() -> float:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def in_own_process(settings: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(settings)], stdout=subprocess.PIPE, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{settings['size']:>5} {settings['method']:<22} {result['seconds']:8.2f} s", file=sys.stderr)
    return result


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """All methods on one size: seconds, and how many times the floor."""
    base = {key: getattr(arguments, key) for key in SETTINGS}
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in arguments.methods}
    for _ in range(arguments.rounds):
        for method in runs:
            runs[method].append(in_own_process(base | {"method": method}))
    seconds = {method: statistics.median(r["seconds"] for r in of) for method, of in runs.items()}
    first = next(iter(runs.values()))[0]
    print(f"\n{first['device']}, {first['threads']} threads, {first['parameters']:,} parameters, {base}\n")
    print("| method | seconds | least - greatest | times the floor | peak host MiB | peak device MiB |")
    print("|---|---|---|---|---|---|")
    for method, of in runs.items():
        spread = f"{min(r['seconds'] for r in of):.2f} - {max(r['seconds'] for r in of):.2f}"
        ratio = seconds[method] / seconds[ALL[0]] if ALL[0] in seconds else float("nan")
        device = "" if of[0]["device_mib"] is None else f"{max(r['device_mib'] for r in of):.0f}"
        host = max(r["host_mib"] for r in of)
        print(f"| {method} | {seconds[method]:.2f} | {spread} | {ratio:.2f} | {host:.0f} | {device} |")
    return {"settings": base, "runs": runs}


def growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory against parameters, and against calibration tokens: powers of them, and straight lines."""
    method = arguments.methods[0] if len(arguments.methods) == 1 else "entropy + esparse"
    base = {key: getattr(arguments, key) for key in SETTINGS}
    base["method"] = method
    by_size = {s: in_own_process(base | {"size": s, "sequences": 8}) for s in ("10m", "30m", "110m", "350m")}
    by_tokens = {n * base["length"]: in_own_process(base | {"size": "30m", "sequences": n}) for n in (8, 16, 32, 64)}
    points = {
        "parameters": {result["parameters"]: result for result in by_size.values()},
        "calibration tokens": by_tokens,
    }
    for what, of in points.items():
        print(f"\n| {what} | seconds | peak host MiB |\n|---|---|---|")
        for x, result in of.items():
            print(f"| {x:,} | {result['seconds']:.2f} | {result['host_mib']:.0f} |")
        print(
            f"\nseconds go with the power {_power({x: r['seconds'] for x, r in of.items()}):.2f} of them (1 is linear);"
        )
        for key in MEASURED:
            print(f"{_said(of, key, what)}, off by {_off(of, key):.0%} at most")
    _plot(points, method, RESULTS / "growth.png")
    return {"settings": base, "points": points}


def _power(values: dict[int, float]) -> float:
    """The slope on logarithmic axes."""
    import numpy as np

    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])


def _line(of: dict[int, dict[str, Any]], key: str) -> tuple[float, float]:
    """The slope of a straight line and its value at zero."""
    import numpy as np

    slope, start = np.polyfit(list(of), [result[key] for result in of.values()], 1)
    return float(slope), float(start)


def _said(of: dict[int, dict[str, Any]], key: str, what: str) -> str:
    (slope, start), (step, name) = _line(of, key), STEPS[what]
    return f"{start:.3g} + {slope * step:.3g} {MEASURED[key]} per {name}"


def _off(of: dict[int, dict[str, Any]], key: str) -> float:
    """How far a measurement is from the straight line at most, as a part of itself."""
    slope, start = _line(of, key)
    return max(abs(start + slope * x - result[key]) / result[key] for x, result in of.items())


def _plot(points: dict[str, dict[int, dict[str, Any]]], method: str, path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(len(MEASURED), len(points), figsize=(9, 5.5), layout="constrained", sharex="col")
    for column, (what, of) in zip(axes.T, points.items(), strict=True):
        for axis, key in zip(column, MEASURED, strict=True):
            slope, start = _line(of, key)
            ends = [0, max(of)]
            axis.plot(list(of), [result[key] for result in of.values()], "o", label="measured")
            axis.plot(ends, [start + slope * x for x in ends], "--", label=_said(of, key, what), zorder=1)
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_formatter(EngFormatter())
            axis.grid(alpha=0.3)
            axis.legend(loc="lower right")
        column[-1].set_xlabel(what)
    for axis, label in zip(axes[:, 0], ("seconds", "peak resident memory, MiB"), strict=True):
        axis.set_ylabel(label)
    figure.suptitle(f"{method}: cost of pruning")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[size for size in SIZES if size != "warm"], default="110m")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--batch-tokens", type=int, help="of one forward pass; by default what esparse takes on the device"
    )
    parser.add_argument(
        "--activations", choices=["host", "device"], default="host", help="where hidden states wait between two blocks"
    )
    parser.add_argument("--methods", nargs="+", choices=ALL, default=ALL, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one)))
        return
    if arguments.batch_tokens is None:
        arguments.batch_tokens = 8192 if torch.cuda.is_available() else 1024
    RESULTS.mkdir(exist_ok=True)
    result = growth(arguments) if arguments.growth else table(arguments)
    result["date"] = time.strftime("%Y-%m-%d")
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    name = f"{'growth' if arguments.growth else f'bench_prune-{arguments.size}'}-{device}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
