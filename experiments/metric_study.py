"""What E-Sparse's metric is worth on a real language model: its conventions beside Wanda, RIA and magnitude.

The paper's formula, |w| * (entropy + alpha * norm), leaves open over which range the histogram is taken, how the norm
is normalised, alpha, and whether a sequence's first token counts. Every combination is a job: the model is pruned block
by block and measured by esparse's own path, in one of several processes that share a GPU (or the CPU). Each finished
job is a line of a file at once, with the loss of each window, so that a run that is killed loses nothing.

    python experiments/metric_study.py tokens TOKENS.npz --model DIR --wikitext FOLDER   # needs the tokeniser; once
    python experiments/metric_study.py list                                              # the jobs, in their order
    python experiments/metric_study.py run TOKENS.npz --model DIR --out study.jsonl --seconds 170 --workers 12
    python experiments/metric_study.py report study.jsonl ...                            # Markdown

Shapes: T tokens, S sequences, L tokens of a sequence, I input channels, O outputs, W windows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout's esparse, in the worker processes as well

from esparse import patterns
from esparse.evaluate.perplexity import perplexity, window_losses
from esparse.metrics import Metric
from esparse.metrics.magnitude import Magnitude
from esparse.metrics.ria import relative_importance
from esparse.models.blocks import BlockModel
from esparse.models.offload import HiddenStateStore
from esparse.pruning.method import Method
from esparse.pruning.prune import prune
from esparse.records.report import Stages
from esparse.shuffles import Layers, NoShuffle, Shuffle
from esparse.shuffles.gns import Gns
from esparse.shuffles.lbs import Esparse, Lbs
from esparse.shuffles.lsa import Lsa
from esparse.stats import ColumnEntropy, ColumnNorm, Factory, LayerStats, statistic

SEEDS = (0, 1, 2)
BINS = 100
LIMIT = 8.0  # of a fixed range, as in conf/metric/entropy.yaml
QUANTILE = 0.001  # of the values that a range by quantiles leaves out at either side
VALUES = 2**22  # of which the quantiles of a whole layer are taken, at most
DRAWS = 20_000
# Corpus, sequences, tokens of each.
CALIBRATIONS = {
    "valid512": ("valid", 32, 512),
    "valid2048": ("valid", 8, 2048),
    "valid128": ("valid", 128, 128),
    "builtin512": ("builtin", 32, 512),
}


# --- statistics that the package lacks ---


def _later(x_TI: Tensor, length: int) -> Tensor:
    """The inputs without those of each sequence's first token; micro-batches hold whole sequences."""
    return x_TI.unflatten(0, (-1, length))[:, 1:].reshape(-1, x_TI.shape[-1])


class LaterNorm(ColumnNorm):
    """The norm without the first token of each sequence."""

    def __init__(self, *, length: int, **size: Any) -> None:
        super().__init__(**size)
        self.length = length

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if pass_index == 0:
            super().add(_later(x_TI, self.length), pass_index)


class RangedEntropy(ColumnEntropy):
    """`ColumnEntropy` over ranges that outliers do not set, with or without the first token of each sequence.

    `range` may also be q (quantiles of the channel), s3, s4, s6 (its mean and so many standard deviations at either
    side), or one of these with `layer-` in front: of all channels together. What lies outside counts into the outermost
    bins.
    """

    def __init__(self, *, range: str, length: int, first: bool, **size: Any) -> None:
        own = range in ("channel", "layer", "fixed")
        super().__init__(bins=BINS, range=range if own else "channel", limit=LIMIT, **size)
        self.bounds, self.length, self.first = None if own else range, length, first
        self._parts: list[Tensor] = []

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        x_TI = x_TI if self.first else _later(x_TI, self.length)
        if self.bounds is not None and pass_index == 0:
            self._parts.append(x_TI)
        else:
            super().add(x_TI, pass_index)

    def add_all(self, parts: Sequence[Tensor], pass_index: int) -> None:
        assert pass_index == 1
        super().add_all(parts if self.first else [_later(x_TI, self.length) for x_TI in parts], pass_index)

    def unite(self, ranks: Any, pass_index: int, tokens: Sequence[int]) -> None:
        if pass_index == 0 and self.bounds is not None:
            self.low_I, self.high_I = _bounds(torch.cat(self._parts), self.bounds)
            self._parts = []
        super().unite(ranks, pass_index, tokens)


def _bounds(x_TI: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each channel's histogram (I values each)."""
    inputs = x_TI.shape[1]
    if rule.startswith("layer-"):
        flat = x_TI.flatten()
        x_TI, rule = flat[:: max(1, len(flat) // VALUES) | 1, None], rule.removeprefix("layer-")  # an odd step
    if rule == "q":
        sorted_TI = x_TI.sort(dim=0).values
        out = int(len(sorted_TI) * QUANTILE)
        low_I, high_I = sorted_TI[out], sorted_TI[-1 - out]
    else:
        mean_I, reach_I = x_TI.mean(0), int(rule[1:]) * x_TI.std(0)
        low_I, high_I = mean_I - reach_I, mean_I + reach_I
    return low_I.expand(inputs).contiguous(), high_I.expand(inputs).contiguous()


# --- the metrics ---


@dataclass(frozen=True, slots=True)
class Spec:
    """One convention of the metric."""

    # wanda | magnitude | ria | sum (entropy + alpha norm) | scaled (both divided by their means over the channels, then
    # the sum) | product (norm * (entropy / mean entropy)^gamma)
    kind: str
    alpha: float = 0.0
    gamma: float = 0.0
    norm: str = "sequence"
    range: str = "channel"
    first: bool = True  # whether the first token of each sequence counts

    def label(self) -> str:
        parts = [self.kind]
        parts += [f"alpha={self.alpha:g}"] if self.alpha else []
        parts += [f"gamma={self.gamma:g}"] if self.gamma else []
        parts += [f"norm={self.norm}"] if self.norm != "sequence" else []
        parts += [f"range={self.range}"] if self.range != "channel" else []
        parts += [] if self.first else ["without first token"]
        return " ".join(parts)

    @property
    def has_entropy(self) -> bool:
        return self.kind in ("sum", "scaled", "product")


@dataclass(kw_only=True, slots=True)
class Convention(Metric):
    """|w|, or RIA's relative importance, times what a `Spec` makes of a channel's entropy and norm."""

    spec: Spec
    length: int

    def collects(self) -> dict[str, Factory]:
        first: Factory = ColumnNorm if self.spec.first else partial(LaterNorm, length=self.length)
        asked = {"norm": first}
        if self.spec.has_entropy:
            asked["entropy"] = partial(RangedEntropy, range=self.spec.range, length=self.length, first=self.spec.first)
        return asked

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        norm_I = stats["norm"].norm_I(self.spec.norm)
        if self.spec.kind == "ria":
            return relative_importance(weight_OI) * norm_I.sqrt()
        if self.spec.kind == "wanda":
            return weight_OI.abs() * norm_I
        return weight_OI.abs() * self._channel(stats["entropy"].entropy_I(), norm_I)

    def _channel(self, entropy_I: Tensor, norm_I: Tensor) -> Tensor:
        share_I = entropy_I / entropy_I.mean().clamp_min(1e-6)
        if self.spec.kind == "product":  # a channel that never changes has no entropy, of which no power is negative
            return norm_I * share_I.clamp_min(1e-3) ** self.spec.gamma
        if self.spec.kind == "scaled":
            return share_I + self.spec.alpha * norm_I / norm_I.mean()
        return entropy_I + self.spec.alpha * norm_I


@dataclass(kw_only=True, slots=True)
class OnHost(Shuffle):
    """Another shuffle, computed on the CPU: its many small steps would make a shared GPU wait."""

    shuffle: Shuffle

    def order(self, scores_OI: Tensor, pattern: Any, layers: Layers | None = None) -> Tensor | None:
        order_I = self.shuffle.order(scores_OI.cpu(), pattern, layers)
        return None if order_I is None else order_I.to(scores_OI.device)


SHUFFLES: dict[str, Shuffle] = {
    "none": NoShuffle(),
    "gns": Gns(deal="straight"),
    "gns serpentine": Gns(deal="serpentine"),
    "lbs": Lbs(objective="score", block=256),
    "esparse": Esparse(objective="score", block=256, deal="straight"),
    "esparse serpentine": Esparse(objective="score", block=256, deal="serpentine"),
    "esparse block=64": Esparse(objective="score", block=64, deal="straight"),
    "esparse block=1024": Esparse(objective="score", block=1024, deal="straight"),
    "lsa": Lsa(objective="score", block=256, deal="serpentine", rounds=1),
}


# --- the jobs ---


@dataclass(frozen=True, slots=True)
class Job:
    """One pruned and measured model. Without a spec the metric is the best one with entropy of those that are done."""

    spec: Spec | None
    pattern: str = "2:4"
    shuffle: str = "none"
    calibration: str = "valid512"
    seed: int = 0

    def key(self) -> dict[str, Any]:
        metric = "best" if self.spec is None else self.spec.label()
        return {**asdict(self), "metric": metric, "spec": None if self.spec is None else asdict(self.spec)}

    def name(self) -> tuple[str, ...]:
        return named(self.key())

    @property
    def searches(self) -> bool:
        return self.shuffle not in ("none", "gns", "gns serpentine")


def named(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells one job from another."""
    return tuple(str(row[part]) for part in ("pattern", "metric", "shuffle", "calibration", "seed"))


DENSE, WANDA, PAPER = Spec("dense"), Spec("wanda"), Spec("sum", alpha=1.0)
SUM16, SCALED = Spec("sum", alpha=16.0), Spec("scaled", alpha=1.0)
UP, DOWN = Spec("product", gamma=0.5), Spec("product", gamma=-0.5)
FIRST = [WANDA, UP, DOWN, SUM16, PAPER]
CORE = [
    *(WANDA, PAPER, SUM16, SCALED, UP, DOWN),
    *(replace(PAPER, range=range) for range in ("layer", "fixed", "q", "layer-q")),
    *(replace(PAPER, alpha=4.0), Spec("scaled", alpha=4.0), Spec("ria")),
]
REFINED = [
    *(replace(PAPER, alpha=64.0), replace(PAPER, alpha=0.25)),
    *(Spec("product", gamma=gamma) for gamma in (-1.0, 0.25, 1.0, 2.0)),
    *(Spec("scaled", alpha=alpha) for alpha in (16.0, 0.25)),
    *(replace(spec, first=False) for spec in (WANDA, PAPER, SUM16, SCALED, UP, DOWN)),
    *(Spec("product", gamma=gamma, range=range) for range in ("layer", "layer-q", "q") for gamma in (0.5, -0.5, 1.0)),
    *(replace(PAPER, range=range) for range in ("s4", "s3", "s6", "layer-s4")),
    *(replace(spec, range=range) for spec in (SUM16, SCALED) for range in ("layer", "fixed", "q", "layer-q", "s4")),
    *(replace(PAPER, norm=norm) for norm in ("rms", "total")),
    *(replace(SUM16, norm=norm) for norm in ("rms", "total")),
]
ABROAD = [WANDA, PAPER, SUM16, SCALED, Spec("scaled", alpha=4.0), UP, DOWN, replace(PAPER, range="layer")]


def jobs() -> tuple[list[Job], list[Job]]:
    """Those of little work for a CPU, and those that search for a channel order, each the most decisive first."""

    def each(specs: Sequence[Spec | None], **rest: Any) -> list[Job]:
        return [Job(spec, seed=seed, **rest) for spec in specs for seed in SEEDS]

    plain = [Job(DENSE), *(Job(spec, seed=seed) for seed in SEEDS for spec in FIRST)]
    plain += [*each([spec for spec in CORE if spec not in FIRST]), Job(Spec("magnitude"))]
    plain += [*each(CORE, pattern="4:8"), Job(Spec("magnitude"), pattern="4:8")]
    plain += each([WANDA, PAPER, SUM16], shuffle="gns") + each([WANDA, PAPER], shuffle="gns serpentine")
    plain += each(REFINED)
    plain += each([None], shuffle="gns")
    for calibration in ("valid2048", "builtin512", "valid128"):
        plain += each(ABROAD, calibration=calibration)
    plain += each(REFINED, pattern="4:8") + each([WANDA, PAPER, None], pattern="4:8", shuffle="gns")
    for calibration in ("valid2048", "builtin512"):
        plain += each(ABROAD, calibration=calibration, pattern="4:8")
    searching = [Job(spec, seed=seed, shuffle="esparse") for seed in SEEDS for spec in (WANDA, UP, DOWN)]
    searching += each([PAPER, SUM16, None, SCALED], shuffle="esparse")
    searching += each([WANDA, PAPER, SUM16, None], shuffle="esparse", pattern="4:8")
    for shuffle in ("lbs", "lsa", "esparse block=1024", "esparse block=64", "esparse serpentine"):
        searching += each([WANDA, None], shuffle=shuffle)
    searching += each([WANDA, PAPER, None], shuffle="esparse", calibration="valid2048")
    searching += each([WANDA, PAPER, None], shuffle="esparse", calibration="builtin512")
    return plain, searching


# --- one process ---


def serve(number: int, pipe: Connection, model: str, tokens: str, device: str, dtype: str) -> None:
    """Takes jobs from the pipe until it gets None, and answers each with its record."""
    torch.set_num_threads(1)
    worker = Worker(model, tokens, torch.device(device), getattr(torch, dtype))
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        try:
            record = worker.carry_out(job)
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {error}"}
        pipe.send({**job.key(), **record, "worker": number})


class Worker:
    """A model in memory that is pruned again and again."""

    def __init__(self, model: str, tokens: str, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)
        if device.type == "cuda":
            # Tiles keep a CPU's cache warm; a GPU would be given nothing but small tasks.
            statistic.TILE = 2**16
        self.device, self.tokens = device, np.load(tokens)
        at_once = 8192 if device.type == "cuda" else 1024
        self.blocks = BlockModel(loaded, device=device, batch_tokens=at_once, hidden_store=HiddenStateStore("device"))
        self.dense = {name: weight.detach().clone() for name, weight in loaded.named_parameters()}

    @torch.no_grad()
    def carry_out(self, job: Job) -> dict[str, Any]:
        assert job.spec is not None
        for name, weight in self.blocks.model.named_parameters():
            weight.copy_(self.dense[name])
        start = time.perf_counter()
        facts: dict[str, Any] = {}
        if job.spec != DENSE:
            tokens_SL = torch.from_numpy(self.tokens[f"{job.calibration}/{job.seed}"].astype(np.int64))
            stages = Stages(self._settle)
            done = prune(self.blocks, tokens_SL, self._method(job, tokens_SL.shape[1]), stages=stages)
            facts = {"density": done.kept / done.weights, "pattern_holds": done.pattern_holds}
            facts["stages"] = {name: round(seconds, 2) for name, seconds in stages.seconds.items()}
        pruned = time.perf_counter()
        losses_W = window_losses(self.blocks, torch.from_numpy(self.tokens["test"].astype(np.int64)))
        facts |= {"perplexity": perplexity(losses_W), "losses": losses_W.tolist()}
        facts |= {"prune_s": round(pruned - start, 2), "evaluate_s": round(time.perf_counter() - pruned, 2)}
        if self.device.type == "cuda":
            facts["device_mib"] = torch.cuda.max_memory_allocated() // 2**20
        return facts

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _method(self, job: Job, length: int) -> Method:
        assert job.spec is not None
        metric = Magnitude() if job.spec.kind == "magnitude" else Convention(spec=job.spec, length=length)
        shuffle = SHUFFLES[job.shuffle]
        shuffle = OnHost(shuffle=shuffle) if job.searches else shuffle
        return Method(metric=metric, pattern=patterns.parse(job.pattern), shuffle=shuffle)


# --- all processes ---


class Queue:
    """The jobs that are left, and what is known of those that are done."""

    def __init__(self, out: Path, only: str, limit: int | None) -> None:
        self.out, self.records, self.running = out, list(read([out])) if out.exists() else [], 0
        done = {named(record) for record in self.records if "losses" in record}  # what failed is tried again
        asked = {job.name() for jobs_ in jobs() for job in jobs_ if re.search(only, " ".join(job.name()))}
        self.left = [[job for job in jobs_ if job.name() in asked - done] for jobs_ in jobs()]
        self.limit = limit
        self.started: set[tuple[str, ...]] = set(done)

    def next(self, searching: bool, seconds_left: float) -> Job | None:
        """The next job, of the preferred kind if there is one that will end in time."""
        if self.limit is not None and self.limit <= 0:
            return None
        for queue in (self.left[searching], self.left[not searching]):
            for job in queue:
                if self._usual_s(job) > seconds_left or (resolved := self._resolved(job)) is None:
                    continue
                queue.remove(job)
                if job.spec is None:  # one and the same metric for all seeds
                    queue[:] = [
                        replace(j, spec=resolved.spec) if replace(j, seed=job.seed) == job else j for j in queue
                    ]
                if resolved.name() in self.started:  # the best one may have had its own turn
                    return self.next(searching, seconds_left)
                self.started.add(resolved.name())
                self.limit = None if self.limit is None else self.limit - 1
                return resolved
        return None

    def _usual_s(self, job: Job) -> float:
        known = [
            r["prune_s"] + r["evaluate_s"]
            for r in self.records
            if "prune_s" in r and r["metric"] != "dense" and Job(None, shuffle=r["shuffle"]).searches == job.searches
        ]
        return float(np.median(known)) if known else 0.0

    def _resolved(self, job: Job) -> Job | None:
        """The job with its metric; None as long as too little is known to say which is the best."""
        if job.spec is not None:
            return job
        seeds: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for record in self.records:
            where = (record["pattern"], record["shuffle"], record["calibration"])
            if "losses" in record and record["spec"] is not None and where == ("2:4", "none", "valid512"):
                seeds[tuple(record["spec"].items())].append(float(np.mean(record["losses"])))
        means = {spec: np.mean(losses) for spec, losses in seeds.items() if len(losses) == len(SEEDS)}
        known = {Spec(**dict(spec)): mean for spec, mean in means.items() if Spec(**dict(spec)).has_entropy}
        wanted = sum(spec.has_entropy for spec in CORE)
        return replace(job, spec=min(known, key=lambda spec: known[spec])) if len(known) >= wanted else None

    def put(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def run(asked: argparse.Namespace) -> int:
    start = time.monotonic()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if asked.device == "auto" else asked.device
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    queue = Queue(asked.out, asked.only, asked.limit)
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, tuple[multiprocessing.process.BaseProcess, bool]] = {}
    for number in range(asked.workers):
        here, there = context.Pipe()
        process = context.Process(
            target=serve, args=(number, there, str(asked.model), str(asked.tokens), device, asked.dtype), daemon=True
        )
        process.start()
        there.close()
        # The first ones take the jobs that are decided on the GPU, the others begin with those that search on the CPU.
        workers[here] = (process, number >= asked.workers - asked.searchers)
    finished = 0
    idle: set[Connection] = set()

    def left() -> float:
        return asked.seconds - (time.monotonic() - start)

    def give(pipe: Connection) -> None:
        job = queue.next(workers[pipe][1], left())
        if job is None:
            idle.add(pipe)
        else:
            pipe.send(job)

    while workers and left() > 0 and len(idle) < len(workers):
        ready = wait([pipe for pipe in workers if pipe not in idle], timeout=max(0.0, left()))
        for pipe in (pipe for pipe in list(workers) if pipe in ready):
            try:
                record = pipe.recv()
            except EOFError:
                print(f"worker {workers.pop(pipe)[0].name} ended", flush=True)
                continue
            if record is not None:
                queue.put(record)
                finished += 1
                said = record.get("error") or f"{record['perplexity']:9.2f} {record['prune_s']:6.1f} s pruned, "
                said += f"{record['evaluate_s']:.1f} s measured" if "losses" in record else ""
                print(f"{time.monotonic() - start:6.1f} s  {' | '.join(named(record)):<70} {said}", flush=True)
                for waiting in list(idle):  # one that waited for the best metric to be known
                    idle.discard(waiting)
                    give(waiting)
            give(pipe)
    for process_, _ in workers.values():
        process_.terminate()
    unfinished = sum(map(len, queue.left))
    print(f"{finished} jobs done in {time.monotonic() - start:.0f} s, {unfinished} not begun", flush=True)
    return 0 if finished else 1


# --- tokens ---


def write_tokens(asked: argparse.Namespace) -> int:
    """The same tokens as `launch.py calibration=text calibration.path=... evaluate=text ...` takes."""
    from transformers import AutoTokenizer

    from esparse.data.calibration import Calibration
    from esparse.data.windows import Perplexity

    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    longest = int(json.loads((Path(asked.model) / "config.json").read_text())["max_position_embeddings"])
    arrays: dict[str, np.ndarray] = {}
    for name, (corpus, sequences, length) in CALIBRATIONS.items():
        path = None if corpus == "builtin" else str(asked.wikitext / f"{corpus}.txt")
        for seed in range(asked.seeds):
            calibration = Calibration(
                corpus="builtin" if path is None else "text", path=path, sequences=sequences, length=length, seed=seed
            )
            arrays[f"{name}/{seed}"] = calibration.sample(tokenizer, longest).numpy().astype(np.uint16)
    texts = Perplexity(corpora=["text"], path=str(asked.wikitext / "test.txt"), length=2048, max_tokens=16384)
    arrays["test"] = texts.windows("text", tokenizer, longest).numpy().astype(np.uint16)
    np.savez_compressed(asked.tokens, **arrays)  # type: ignore[arg-type]
    print(f"{asked.tokens}: {len(arrays)} arrays, {asked.tokens.stat().st_size:,} bytes")
    return 0


# --- the report ---


def read(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The records of several files; a line that a killed run left half written is passed over."""
    for file in files:
        for line in file.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                print(f"{file}: passed over a line that is not whole", file=sys.stderr)


Losses = dict[int, np.ndarray]  # by seed: one loss (nats) per window


def compare(mine: Losses, others: Losses) -> tuple[float, float, float, int, int]:
    """The difference of mean losses, its 95 % interval, in how many seeds it is negative, seeds in common.

    Windows and seeds are both drawn with replacement, the same for the two.
    """
    seeds = sorted(mine.keys() & others.keys())
    by_seed = np.stack([mine[seed] - others[seed] for seed in seeds])
    random = np.random.default_rng(0)
    drawn_seeds = random.integers(len(seeds), size=(DRAWS, len(seeds), 1))
    drawn_windows = random.integers(by_seed.shape[1], size=(DRAWS, 1, by_seed.shape[1]))
    low, high = np.quantile(by_seed[drawn_seeds, drawn_windows].mean(axis=(1, 2)), [0.025, 0.975])
    return float(by_seed.mean()), float(low), float(high), int((by_seed.mean(1) < 0).sum()), len(seeds)


def verdict(low: float, high: float) -> str:
    return "better" if high < 0 else "worse" if low > 0 else "not told apart"


def report(asked: argparse.Namespace) -> int:
    cases: dict[tuple[str, str, str], dict[str, Losses]] = defaultdict(lambda: defaultdict(dict))
    failed, dense = [], None
    for record in read(asked.files):
        if "losses" not in record:
            failed.append(record)
        elif record["metric"] == "dense":
            dense = float(np.mean(record["losses"]))
        else:
            case = (record["pattern"], record["calibration"], record["shuffle"])
            cases[case][record["metric"]][record["seed"]] = np.array(record["losses"])
    if dense is not None:
        print(f"Dense: {np.exp(dense):.2f}.\n")
    for record in failed:
        print(f"Failed: {' | '.join(named(record))}: {record['error']}\n")
    order = list(SHUFFLES)
    for case in sorted(cases, key=lambda case: (case[0], list(CALIBRATIONS).index(case[1]), order.index(case[2]))):
        print("\n".join(_table(case, cases[case])), end="\n\n")
    print("\n".join(_shuffles(cases)), end="\n\n")
    print("\n".join(_overall(cases)))
    return 0


def _percent(value: float) -> str:
    return f"{100 * (np.exp(value) - 1):+.1f} %"


def _row(first: Sequence[str], mine: Losses, others: Losses | None) -> str:
    means = [float(np.exp(losses.mean())) for _, losses in sorted(mine.items())]
    cells = [*first, f"{np.exp(np.mean([losses.mean() for losses in mine.values()])):.2f}"]
    cells.append(" ".join(f"{mean:.1f}" for mean in means))
    if others is not None and mine.keys() & others.keys():
        middle, low, high, below, seeds = compare(mine, others)
        cells += [_percent(middle), f"{_percent(low)} to {_percent(high)}", f"{below} of {seeds}", verdict(low, high)]
    return "| " + " | ".join(cells + [""] * (len(first) + 6 - len(cells))) + " |"


HEAD = ["perplexity", "by seed", "against {}", "95 %", "seeds below", ""]


def _head(first: Sequence[str], against: str) -> list[str]:
    cells = [*first, *(cell.format(against) for cell in HEAD)]
    return ["| " + " | ".join(cells) + " |", "|" + " --- |" * len(cells)]


def _table(case: tuple[str, str, str], metrics: dict[str, Losses]) -> list[str]:
    """One pattern, calibration and shuffle: all metrics against Wanda, the lowest perplexity first."""
    wanda = metrics.get("wanda")
    ranked = sorted(metrics, key=lambda metric: float(np.mean([loss.mean() for loss in metrics[metric].values()])))
    rows = [_row([metric], metrics[metric], None if metric == "wanda" else wanda) for metric in ranked]
    return [f"## {case[0]}, {case[1]}, shuffle {case[2]}", "", *_head(["metric"], "wanda"), *rows]


def _shuffles(cases: dict[tuple[str, str, str], dict[str, Losses]]) -> list[str]:
    """What each shuffle does to each metric, against the same metric without one."""
    rows = []
    for (pattern, calibration, shuffle), metrics in cases.items():
        for metric, losses in metrics.items():
            bare = cases.get((pattern, calibration, "none"), {}).get(metric)
            if shuffle != "none" and bare is not None:
                rows.append(_row([pattern, calibration, metric, shuffle], losses, bare))
    head = _head(["pattern", "calibration", "metric", "shuffle"], "no shuffle")
    return ["## Shuffles", "", *head, *sorted(rows)]


def _overall(cases: dict[tuple[str, str, str], dict[str, Losses]]) -> list[str]:
    """Each metric against Wanda over all cases that have both: the mean, the worst, and the verdicts' counts."""
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for metrics in cases.values():
        for metric, losses in metrics.items():
            if metric != "wanda" and metrics.get("wanda", {}).keys() & losses.keys():
                middle, low, high, *_ = compare(losses, metrics["wanda"])
                found[metric].append((middle, verdict(low, high)))
    rows = []
    for metric, results in sorted(found.items(), key=lambda item: (-len(item[1]), np.mean([m for m, _ in item[1]]))):
        middles, verdicts = [m for m, _ in results], [v for _, v in results]
        counts = " / ".join(str(verdicts.count(v)) for v in ("better", "not told apart", "worse"))
        spread = f"{_percent(float(np.mean(middles)))} | {_percent(max(middles))}"
        rows.append(f"| {metric} | {len(results)} | {spread} | {counts} |")
    head = "| metric | cases | mean against wanda | worst case | better / not told apart / worse |"
    return ["## Over all cases (pattern, calibration, shuffle) with Wanda beside", "", head, "|" + " --- |" * 5, *rows]


def list_jobs(asked: argparse.Namespace) -> int:
    for title, queue in zip(("plain", "searching"), jobs(), strict=True):
        print(f"{title}: {len(queue)} jobs")
        for job in queue:
            if job.seed == 0:
                print("  " + " | ".join(job.name()[:-1]))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    tokens = commands.add_parser("tokens", help="writes the calibration and test tokens of all seeds into one file")
    tokens.set_defaults(do=write_tokens)
    tokens.add_argument("tokens", type=Path)
    tokens.add_argument("--model", required=True, help="folder with the tokeniser")
    tokens.add_argument("--wikitext", type=Path, required=True, help="folder with valid.txt and test.txt")
    tokens.add_argument("--seeds", type=int, default=6)
    runs = commands.add_parser("run", help="carries out the jobs that the file of results does not have yet")
    runs.set_defaults(do=run)
    runs.add_argument("tokens", type=Path)
    runs.add_argument("--model", type=Path, required=True)
    runs.add_argument("--out", type=Path, default=Path("study.jsonl"))
    runs.add_argument("--seconds", type=float, default=170.0, help="for everything, loading included")
    runs.add_argument("--workers", type=int, default=12 if torch.cuda.is_available() else 1)
    runs.add_argument("--searchers", type=int, default=None, help="workers that begin with searching shuffles")
    runs.add_argument("--limit", type=int, help="jobs, at most")
    runs.add_argument("--only", default="", help="regular expression on `pattern metric shuffle calibration seed`")
    runs.add_argument("--device", default="auto")
    # bfloat16 takes half the time of float32 on processors that multiply it
    runs.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    commands.add_parser("list", help="the jobs in their order").set_defaults(do=list_jobs)
    reports = commands.add_parser("report", help="Markdown tables of files of results")
    reports.set_defaults(do=report)
    reports.add_argument("files", type=Path, nargs="+")
    asked = parser.parse_args()
    if asked.do is run and asked.searchers is None:
        asked.searchers = asked.workers // 2
    return asked.do(asked)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
