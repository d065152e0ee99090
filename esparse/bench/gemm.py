"""`bench=gemm`: the pruned layers' products, dense against every sparse kernel, over numbers of tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.bench import Bench, LayerShape, Measured, Subject, distinct, quartiles
from esparse.bench.shapes import NAMED
from esparse.errors import Mistake
from esparse.patterns import NM

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from esparse.bench.limits import Limits
    from esparse.bench.products import Case, Kernel
    from esparse.bench.search import Algorithms
    from esparse.bench.timing import Clock, Protocolled, Timing

log = logging.getLogger("esparse")

OWN = "own"
DTYPES = ("float16", "bfloat16", "float32", "int8", "float8_e4m3fn")
KERNEL_NAMES = ("cusparselt", "cusparselt_default", "cutlass", "packed", "packed_gather", "decode")


@dataclass(kw_only=True, slots=True)
class Gemm(Bench):
    """Times products of the model's or of published models' shapes, with random weights in the run's pattern."""

    shapes: list[str]  # own (the pruned layers') | llama-7b, llama-13b, llama-30b, llama-65b, opt-6.7b, opt-30b
    tokens: list[int]  # numbers of tokens
    dtypes: list[str]  # bfloat16, float16, float32, int8, float8_e4m3fn
    kernels: list[str]  # which sparse kernels (page Results); empty: all
    warm_up: int  # replays that are not counted
    repeats: int  # replays that are
    least_ms: float  # milliseconds of one replay, which makes as many calls as that takes
    graph_below_ms: float  # calls that are shorter are captured into a CUDA graph
    cache: str  # JSON file in which the algorithms that were found for cuSPARSELt are kept

    def __post_init__(self) -> None:
        _known("bench.shapes", self.shapes, (OWN, *NAMED))
        _known("bench.dtypes", self.dtypes, DTYPES)
        _known("bench.kernels", self.kernels, KERNEL_NAMES, may_be_empty=True)
        if not self.tokens or min(self.tokens) < 1:
            raise Mistake(f"bench.tokens must be positive numbers, got {self.tokens}")
        if self.warm_up < 1 or self.repeats < 1:
            raise Mistake(f"bench.warm_up and bench.repeats must be positive, got {self.warm_up}, {self.repeats}")

    def layers(self, own: list[LayerShape]) -> list[LayerShape]:
        """One layer of each requested shape; names of published models' layers begin with the model's name."""
        layers = []
        for name in self.shapes:
            of = own if name == OWN else [layer._replace(layer=f"{name} {layer.layer}") for layer in NAMED[name]]
            layers += distinct(of)
        return layers

    def run(self, subject: Subject) -> Measured:
        from esparse.bench.search import Algorithms
        from esparse.bench.timing import CudaClock

        algorithms = Algorithms.of(subject.device, Path(self.cache).expanduser())
        return self.measure(subject.layers, subject.nm, subject.device, CudaClock(subject.device), algorithms)

    def measure(
        self,
        own: list[LayerShape],
        nm: NM,
        device: torch.device,
        clock: Clock,
        algorithms: Algorithms,
        *,
        limit_size: int = 8192,
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> Measured:
        """All rows; a kernel that fails or gives wrong results gets a row with the reason instead of times."""
        from esparse.bench.limits import limits
        from esparse.bench.products import KERNELS, Case
        from esparse.bench.timing import Protocolled

        how = Protocolled(self.warm_up, self.repeats, self.least_ms, self.graph_below_ms)
        most = limits(device, self.dtypes, clock, how, size=limit_size)
        kernels = {name: KERNELS[name] for name in self.kernels or KERNELS}
        cases = [
            (layer, Case(tokens, layer.rows, layer.inputs, dtype, nm))
            for dtype in self.dtypes
            for layer in self.layers(own)
            for tokens in self.tokens
        ]
        refusals = {(name, k.why_not(case)) for name, k in kernels.items() for _, case in cases}
        for name, why in sorted((name, why) for name, why in refusals if why):
            log.info("%s is not measured in all cases: %s", name, why)
        searched = [case for _, case in cases if any(k.searched and k.why_not(case) is None for k in kernels.values())]
        algorithms.search(searched)
        measured = Measured(limits=most.record())
        for layer, case in cases:
            for row in rows(layer, case, kernels, device, clock, how, most, algorithms):
                measured.rows.append(row)
                on_row(row)
                log.debug("%s", row)
        return measured


def _known(setting: str, given: list[str], known: tuple[str, ...], *, may_be_empty: bool = False) -> None:
    wrong = [name for name in given if name not in known]
    if wrong or not (given or may_be_empty):
        raise Mistake(f"{setting} may hold {', '.join(known)}, got {wrong[0] if wrong else 'nothing'}")


def rows(
    layer: LayerShape,
    case: Case,
    kernels: dict[str, Kernel],
    device: torch.device,
    clock: Clock,
    how: Protocolled,
    most: Limits,
    algorithms: Algorithms,
) -> list[dict[str, Any]]:
    """The rows of one product: every kernel that takes it, timed alternately with the dense product."""
    from esparse.bench import products as table
    from esparse.bench.timing import measure, rotation
    from esparse.kernels.linear import Algorithm

    weight_RI = table.pruned(table.random_weight(case.rows, case.inputs, case.dtype, device), case.nm)
    dense = table.dense_product(case.dtype)
    around = case.bytes_of_activations
    turns = rotation(weight_RI.nbytes + around, clock)
    inputs = _inputs(case, device, turns)
    weights = [weight_RI.clone() for _ in range(turns)]
    calls: dict[str, list[Callable[[], object]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    try:
        dense(weight_RI, inputs[0])
    except RuntimeError as reason:
        return [_row(layer, case, "dense", None, None, why=_first_line(reason))]
    calls["dense"] = [partial(dense, w, inputs[i % len(inputs)]) for i, w in enumerate(weights)]
    for name, kernel in kernels.items():
        if kernel.why_not(case) is not None:
            continue
        algorithm = algorithms.get(case) if kernel.searched else Algorithm()
        if algorithm is None:
            failed[name] = "no algorithm was found that is right"
            continue
        try:
            prepared = kernel.prepare(weight_RI, case)
            off = _worst_error(kernel, prepared, weight_RI, case, algorithm, device)
            if off > table.TOLERANCE[case.dtype]:
                failed[name] = f"wrong: relative error {off:.2g}"
                continue
            others = rotation(prepared.weight_bytes + around, clock) - 1
            copies = [prepared, *(kernel.prepare(weight_RI, case) for _ in range(others))]
        except RuntimeError as reason:
            failed[name] = _first_line(reason)
            continue
        calls[name] = [partial(kernel.call, p, inputs[i % len(inputs)], case, algorithm) for i, p in enumerate(copies)]
        facts[name] = {"weight_bytes": prepared.weight_bytes, "relative_error": off, "cores": kernel.sparse_cores}
        if kernel.searched:
            facts[name]["algorithm"] = list(algorithm)
    timings = measure(calls, clock, how)
    found = []
    for name, fact in facts.items():
        least = _least_ms(most, case, fact["weight_bytes"], sparse_cores=fact.pop("cores"))
        least_dense = _least_ms(most, case, weight_RI.nbytes, sparse_cores=False)
        found.append(
            _row(layer, case, name, timings["dense"], timings[name])
            | {"limit_ms": least, "share_of_limit": least / timings[name].ms}
            | {"dense_limit_ms": least_dense, "dense_share_of_limit": least_dense / timings["dense"].ms}
            | {"limit_speedup": least_dense / least, "dense_bytes": weight_RI.nbytes}
            | fact
        )
    return found + [_row(layer, case, name, timings["dense"], None, why=why) for name, why in failed.items()]


def _least_ms(most: Limits, case: Case, weight_bytes: int, *, sparse_cores: bool) -> float:
    return most.ms(
        weight_bytes=weight_bytes,
        tokens=case.tokens,
        rows=case.rows,
        inputs=case.inputs,
        dtype=case.dtype,
        sparse_cores=sparse_cores,
    )


def _inputs(case: Case, device: torch.device, turns: int) -> list[Tensor]:
    from esparse.bench.products import random_input

    # In a model, too, a few tokens come from the cache; many tokens rotate with the weights.
    copies = min(turns, 4) if case.tokens >= 256 else 1
    return [random_input(case.tokens, case.inputs, case.dtype, device, seed=1 + i) for i in range(copies)]


def _worst_error(
    kernel: Kernel, prepared: Any, weight_RI: Tensor, case: Case, algorithm: Any, device: torch.device
) -> float:
    """The worst error over two inputs; of many tokens only the first and last 64 are compared."""
    from esparse.bench import products as table

    worst = 0.0
    for seed in (11, 12):
        x_TI = table.random_input(case.tokens, case.inputs, case.dtype, device, seed)
        y_TR = kernel.call(prepared, x_TI, case, algorithm)
        if kernel.gathers:
            x_TI = x_TI[:, prepared.parts["order"]]
        for part in (slice(0, 64), slice(-64, None)):
            worst = max(worst, table.error(y_TR[part], table.reference(weight_RI, x_TI[part])))
    return worst


def _row(
    layer: LayerShape, case: Case, kernel: str, dense: Timing | None, sparse: Timing | None, why: str | None = None
) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "matrices": layer.matrices,
        "tokens": case.tokens,
        "n": case.rows,
        "k": case.inputs,
        "dtype": case.dtype,
        "pattern": str(case.nm),
        "kernel": kernel,
        "dense_ms": dense.ms if dense else None,
        "sparse_ms": sparse.ms if sparse else None,
        "speedup": dense.ms / sparse.ms if dense and sparse else None,
        **quartiles("dense", dense),
        **quartiles("sparse", sparse),
        "why_not": why,
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
