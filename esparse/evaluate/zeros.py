"""Measures sparsity: the shares of zeros and near zeros in a model's weights, activations and attention.

A value is near zero if |x| is at most a threshold times the root mean square of its tensor: one weight, or the input of
one layer over all tokens. Attention probabilities are compared with 1, per head, and only for a token itself and
earlier ones (causality). They are read from the softmax over (sequences, heads, queries, keys), whatever the family
calls it; for that the model's attention is switched to the implementation that has them as a tensor.

Shapes: T tokens, I channels, B sequences, N heads, L tokens of a sequence.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from esparse.models.activations import Activations
from esparse.models.blocks import BlockModel
from esparse.models.matrices import BlockMatrices, InputGroup

log = logging.getLogger("esparse")

THRESHOLDS = (0.0, 0.001, 0.01, 0.1)
SEQUENCES = 4  # one at a time: the probabilities of one layer take heads x L x L values
VALUES_AT_ONCE = 2**24
SOFTMAX = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)

# (weight, activation or attention; name; head of attention or None)
Key = tuple[str, str, int | None]
Shares = dict[Key, dict[str, Any]]


@dataclass(slots=True)
class Count:
    """The number of values, and how many of them are below each threshold times the scale."""

    values: int = 0
    squares: float = 0.0
    below: list[int] = field(default_factory=lambda: [0] * len(THRESHOLDS))

    def add(self, x: Tensor) -> None:
        """Adds values to the scale."""
        self.values += x.numel()
        self.squares += sum(float(part.double().square().sum()) for part in _parts(x))

    @property
    def scale(self) -> float:
        return (self.squares / self.values) ** 0.5 if self.values else 0.0

    def count(self, x: Tensor, scale: float) -> None:
        for part in _parts(x):
            magnitude = part.float().abs()
            for i, threshold in enumerate(THRESHOLDS):
                self.below[i] += int((magnitude <= threshold * scale).sum())

    def shares(self) -> dict[str, Any]:
        of_each = (count / self.values if self.values else 0.0 for count in self.below)
        return {"values": self.values} | {f"{t:g}": share for t, share in zip(THRESHOLDS, of_each, strict=True)}


@torch.no_grad()
def shares(blocks: BlockModel, tokens_SL: Tensor) -> Shares:
    """The shares of all layers and heads on the first SEQUENCES sequences, one block at a time.

    The experts of one parameter count as one layer. If a family's attention is not available as a tensor, it is left
    out, and the log says so.
    """
    found: Shares = {}
    with _eager(blocks):
        stream = Activations(blocks, tokens_SL[:SEQUENCES], 1)
        for index in range(len(blocks.blocks)):
            name = f"{blocks.prefix}.{index}"
            with blocks.resident(index) as module:
                matrices = BlockMatrices(module, name)
                for entry, parameter in matrices.parameters().items():
                    of_weight = Count()
                    of_weight.add(parameter)
                    of_weight.count(parameter, of_weight.scale)
                    found["weight", entry.removesuffix(".weight"), None] = of_weight.shares()
                inputs: dict[str, Count] = {}
                with matrices.observed(lambda group, x_TI: _of(inputs, group).add(x_TI)):  # noqa: B023
                    stream.observe(index)
                heads: dict[int, Count] = {}
                again = _again(inputs)
                with matrices.observed(again), _Softmax(lambda p_BNLL: _attend(heads, p_BNLL)):  # noqa: B023
                    stream.advance(index)
                found |= {("activation", entry, None): count.shares() for entry, count in inputs.items()}
                found |= {("attention", name, head): count.shares() for head, count in sorted(heads.items())}
    if not any(kind == "attention" for kind, _, _ in found):
        log.warning("the profile has no attention: this model does not compute its probabilities as a tensor")
    return found


def report(dense: Shares, pruned: Shares, tokens_SL: Tensor) -> dict[str, Any]:
    """The record's rows: one per layer or head, with its shares before and after pruning, by threshold."""
    rows = [
        {"kind": kind, "name": name, "head": head, "values": before["values"]}
        | {f"{which} {t:g}": of[f"{t:g}"] for which, of in (("dense", before), ("pruned", after)) for t in THRESHOLDS}
        for (kind, name, head), before in dense.items()
        if (after := pruned.get((kind, name, head))) is not None
    ]
    sequences, length = tokens_SL[:SEQUENCES].shape
    return {"thresholds": list(THRESHOLDS), "sequences": sequences, "length": length, "rows": rows}


def _parts(x: Tensor) -> Sequence[Tensor]:
    return x.reshape(-1).split(VALUES_AT_ONCE)  # in parts, because the experts of one parameter are large


def _of(counts: dict[str, Count], group: InputGroup) -> Count:
    return counts.setdefault(group.matrices[0].entry.removesuffix(".weight"), Count())


def _again(counts: dict[str, Count]) -> Callable[[InputGroup, Tensor], None]:
    scales = {entry: count.scale for entry, count in counts.items()}

    def read(group: InputGroup, x_TI: Tensor) -> None:
        count = _of(counts, group)
        count.count(x_TI, scales[group.matrices[0].entry.removesuffix(".weight")])

    return read


def _attend(heads: dict[int, Count], p_BNLL: Tensor) -> None:
    """Counts the probabilities of one layer and micro-batch, per head."""
    length = p_BNLL.shape[-2]
    seen_LL = torch.ones(length, length, dtype=torch.bool, device=p_BNLL.device).tril()
    for head, p_BLL in enumerate(p_BNLL.unbind(1)):
        p = p_BLL[:, :, :length][:, seen_LL]
        of_head = heads.setdefault(head, Count())
        of_head.values += p.numel()
        of_head.count(p, 1.0)


class _Softmax(TorchFunctionMode):
    """Calls `read` with every attention softmax: four dimensions, as many keys as queries (plus one, for a sink)."""

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in SOFTMAX and out.ndim == 4 and 0 <= out.shape[-1] - out.shape[-2] <= 1:
            self._read(out)
        return out


@contextlib.contextmanager
def _eager(blocks: BlockModel) -> Iterator[None]:
    """While open, attention is computed step by step (`eager`), if the family can."""
    model = blocks.model
    before = model.config._attn_implementation
    try:
        if before != "eager":
            with contextlib.suppress(ValueError):  # the family has no such implementation
                model.set_attn_implementation("eager")
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
