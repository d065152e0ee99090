"""`bench=model`: times prefill and decode of the whole model, dense and sparse, with a shuffle's gathers.

Dense and sparse are the same module: a switch decides whether pruned layers use dense or packed weights, so that
everything around the layers, with or without a graph, is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from esparse.bench import Bench, Measured, Subject, quartiles
from esparse.errors import Mistake

log = logging.getLogger("esparse")


@dataclass(kw_only=True, slots=True)
class ModelBench(Bench):
    """Times the whole model on `prompt` tokens at once, and on one more token, for several numbers of sequences."""

    prompt: int  # tokens of a sequence
    batches: list[int]  # sequences at once
    warm_up: int  # replays that are not counted
    repeats: int  # replays that are
    least_ms: float  # milliseconds of one replay, which makes as many calls as that takes
    graph_below_ms: float  # passes that are shorter are captured into a CUDA graph, if the model allows it
    cache: str  # JSON file in which the algorithms that were found for cuSPARSELt are kept

    def __post_init__(self) -> None:
        if self.prompt < 1 or not self.batches or min(self.batches) < 1:
            raise Mistake(
                f"bench.prompt and bench.batches must be positive, got {self.prompt} and {list(self.batches)}"
            )
        if self.warm_up < 1 or self.repeats < 1:
            raise Mistake(f"bench.warm_up and bench.repeats must be positive, got {self.warm_up}, {self.repeats}")

    def needs_weights(self) -> bool:
        return True

    def run(self, subject: Subject) -> Measured:
        from esparse.bench.search import Algorithms
        from esparse.bench.timing import CudaClock

        return self.measure(
            subject, CudaClock(subject.device), Algorithms.of(subject.device, Path(self.cache).expanduser())
        )

    def measure(self, subject: Subject, clock: Any, algorithms: Any) -> Measured:
        """One row each for prefill and decode per number of sequences.

        Raises Mistake if no pruned layer is a Linear, or if packed layers compute something else.
        """
        import torch

        from esparse.bench.timing import Protocolled, measure
        from esparse.models import context

        if any(parameter.is_meta for parameter in subject.model.parameters()):
            raise Mistake("bench=model times the whole model, whose weights are not in memory: use model.store=memory")
        how = Protocolled(self.warm_up, self.repeats, self.least_ms, self.graph_below_ms)
        model: Any = subject.model.to(subject.device)
        measured = Measured()
        with torch.inference_mode(), switched(subject, algorithms, self._tokens()) as switch:
            for batch in self.batches:
                tokens_BL = torch.randint(1, model.config.vocab_size, (batch, self.prompt), device=subject.device)
                behind = context.read(model, tokens_BL)
                phases = {
                    "prefill": partial(context.prefill, model, tokens_BL),
                    "decode": partial(context.step, model, tokens_BL[:, -1:], behind),
                }
                for phase, run in phases.items():
                    off = _difference(switch, run)
                    timings = measure(
                        {name: [switch.during(name == "sparse", run)] for name in ("dense", "sparse")}, clock, how
                    )
                    row = self._row(phase, batch, timings, switch) | {"relative_difference": off}
                    measured.rows.append(row)
        measured.limits = switch.bytes()
        return measured

    def _tokens(self) -> list[int]:
        return sorted({batch * self.prompt for batch in self.batches})

    def _row(self, phase: str, batch: int, timings: dict[str, Any], switch: Switch) -> dict[str, Any]:
        dense, sparse = timings["dense"], timings["sparse"]
        return {
            "layer": "model",
            "phase": phase,
            "sequences": batch,
            "prompt": self.prompt,
            "tokens": batch * self.prompt if phase == "prefill" else batch,
            "n": None,
            "k": None,
            "kernel": ", ".join(sorted(switch.ways)),
            "dense_ms": dense.ms,
            "sparse_ms": sparse.ms,
            "speedup": dense.ms / sparse.ms,
            **quartiles("dense", dense),
            **quartiles("sparse", sparse),
            "packed_layers": len(switch.layers),
            "gathers": switch.gathers,
        }


@dataclass(slots=True)
class Packed:
    """A layer's packed weights on the device."""

    values: Any
    bits: Any
    blob: Any
    order: Any
    bias: Any
    algorithms: dict[int, Any]  # by tokens


class Switch:
    """Switches the pruned layers between dense and packed weights."""

    def __init__(self) -> None:
        self.sparse = False
        self.layers: dict[str, Packed] = {}
        self.ways: set[str] = set()  # kernels of the last sparse pass
        self.gathers = 0  # gathers in the last sparse pass, except those inside a kernel
        self._gathered: tuple[Any, Any, Any] | None = None

    def during(self, sparse: bool, run: Callable[[], Any]) -> Callable[[], Any]:
        def switched() -> Any:
            self.sparse, self.ways, self.gathers, self._gathered = sparse, set(), 0, None
            return run()

        return switched

    def gather(self, x: Any, order: Any) -> Any:
        """x in this order; layers that read one tensor in one order share the gather."""
        if self._gathered is None or self._gathered[0] is not x or self._gathered[1] is not order:
            self._gathered = x, order, x[..., order]
            self.gathers += 1
        return self._gathered[2]

    def bytes(self) -> dict[str, int]:
        from esparse.kernels.linear import resident_bytes

        packed = sum(resident_bytes(p.values, p.bits, p.blob) for p in self.layers.values())
        lean = sum(p.values.nbytes + p.bits.nbytes for p in self.layers.values())
        return {"packed_bytes": lean, "packed_bytes_with_cusparselt": packed}


@contextmanager
def switched(subject: Subject, algorithms: Any, tokens: list[int]) -> Iterator[Switch]:
    """While open, the model's pruned linear layers obey a switch."""
    from torch import nn

    names = [name for name in subject.keeps if isinstance(_module(subject.model, name), nn.Linear)]
    if not names:
        raise Mistake("bench=model computes from packed weights of linear layers, and no pruned layer is one")
    if left := len(list(subject.keeps)) - len(names):
        log.info("%d pruned weights do not belong to linear layers and are timed dense", left)
    switch = Switch()
    orders: dict[bytes, Any] = {}
    forwards = {}
    for name in names:
        layer: Any = _module(subject.model, name)
        switch.layers[name] = _packed(layer, name, subject, orders)
        forwards[name] = layer.forward
    _search(switch.layers, subject, algorithms, tokens)
    for name, packed in switch.layers.items():
        layer = _module(subject.model, name)
        layer.forward = _obeying(switch, packed, forwards[name], subject)
    try:
        yield switch
    finally:
        for name in names:
            del _module(subject.model, name).__dict__["forward"]


def _module(model: Any, weight: str) -> Any:
    try:
        return model.get_submodule(weight.removesuffix(".weight"))
    except AttributeError:
        return None


def _packed(layer: Any, name: str, subject: Subject, orders: dict[bytes, Any]) -> Packed:
    import torch

    from esparse.kernels.form import to_form
    from esparse.kernels.linear import compress, shared_values, why_not_cusparselt

    weight_RI, keep_RI = layer.weight.data, subject.keeps[name].to(subject.device)
    order_I = subject.orders.get(name)
    if order_I is not None:
        key = order_I.numpy().tobytes() if order_I.device.type == "cpu" else order_I.cpu().numpy().tobytes()
        order_I = orders.setdefault(key, order_I.to(subject.device, torch.int32))
        weight_RI, keep_RI = weight_RI[:, order_I], keep_RI[:, order_I]
    values_RK, bits_RB = to_form(weight_RI, keep_RI)
    blob = None
    nm = subject.nm
    on_gpu = weight_RI.is_cuda and torch.backends.cusparselt.is_available()
    if on_gpu and why_not_cusparselt(*weight_RI.shape, n=nm.n, m=nm.m, dtype=weight_RI.dtype) is None:
        blob = compress(torch.where(keep_RI, weight_RI, 0.0).contiguous())
        shared_RK = shared_values(values_RK, blob)
        values_RK = values_RK if shared_RK is None else shared_RK
    return Packed(values_RK, bits_RB, blob, order_I, layer.bias, {})


def _search(layers: Mapping[str, Packed], subject: Subject, algorithms: Any, tokens: list[int]) -> None:
    """Searches the fastest cuSPARSELt algorithm of each layer, for each number of tokens."""
    from esparse.bench.products import Case
    from esparse.kernels.linear import few_tokens

    wanted: dict[Case, list[Packed]] = {}
    for packed in layers.values():
        if packed.blob is not None:
            rows, inputs = packed.values.shape[0], packed.values.shape[1] * 2
            name = str(packed.values.dtype).removeprefix("torch.")
            few = few_tokens(packed.values.dtype, inputs, n=subject.nm.n, m=subject.nm.m)
            for count in tokens:
                if count > few:
                    wanted.setdefault(Case(count, rows, inputs, name, subject.nm), []).append(packed)
    if wanted:
        algorithms.search(list(wanted))
    for case, of in wanted.items():
        if (found := algorithms.get(case)) is not None:
            for packed in of:
                packed.algorithms[case.tokens] = found


def _obeying(switch: Switch, packed: Packed, dense: Callable[[Any], Any], subject: Subject) -> Callable[[Any], Any]:
    from esparse.kernels import linear as kernels

    nm = subject.nm

    def forward(x: Any) -> Any:
        if not switch.sparse:
            return dense(x)
        tokens = x.numel() // x.shape[-1]
        facts = {"on_gpu": x.is_cuda, "has_triton": kernels.has_triton(), "has_blob": packed.blob is not None}
        few = kernels.few_tokens(x.dtype, x.shape[-1], n=nm.n, m=nm.m)
        way = kernels.kernel(tokens, few, n=nm.n, m=nm.m, **facts)
        switch.ways.add(way)
        order = packed.order
        if order is not None and way != "gemv":  # that kernel gathers by itself
            x, order = switch.gather(x, order), None
        return kernels.packed_linear(
            packed.values,
            packed.bits,
            x,
            n=nm.n,
            m=nm.m,
            order_I=order,
            bias_R=packed.bias,
            blob=packed.blob,
            algorithm=packed.algorithms.get(tokens),
        )

    return forward


def _difference(switch: Switch, run: Callable[[], Any]) -> float:
    """The relative Frobenius distance of the sparse logits from the dense ones."""
    dense = switch.during(False, run)().double()
    sparse = switch.during(True, run)().double()
    off = float((sparse - dense).norm() / dense.norm())
    if not off < 0.1:
        raise Mistake(f"the packed layers do not compute what the dense ones do: logits differ by {off:.2g}")
    return off
