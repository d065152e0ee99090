"""Times dense against sparse: matrix products (`gemm`) or the whole model (`model`).

All numbers are measured. The package does not know how weights were chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from esparse.errors import Mistake
from esparse.patterns import NM, Pattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from esparse.bench.timing import Timing


class LayerShape(NamedTuple):
    """A pruned matrix: name, rows (outputs) x inputs, and the number of `matrices` of this shape."""

    layer: str
    rows: int
    inputs: int
    matrices: int = 1


@dataclass(slots=True)
class Subject:
    """The subject of a benchmark: a pruned model, its layers, and keep masks and channel orders by weight name."""

    model: nn.Module
    layers: list[LayerShape]
    keeps: Any
    orders: dict[str, Tensor]
    nm: NM
    device: torch.device


@dataclass(slots=True)
class Measured:
    """The rows of the record's `latency`, and the device's `limits`, measured in the same run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Bench(ABC):
    """Base class of benchmarks at the end of a run."""

    @property
    def option(self) -> str:
        """Its name on the command line, by its class's: model for ModelBench."""
        return type(self).__name__.removesuffix("Bench").lower()

    def check(self, pattern: Pattern) -> None:
        """Raises Mistake if no kernel takes the pattern's packed form."""
        if not isinstance(pattern, NM):
            raise Mistake(
                f"bench={self.option} measures kernels for n:m patterns, not {pattern}: "
                "use bench=none or a pattern such as 2:4"
            )

    def require(self, device: torch.device) -> None:
        """Raises Mistake if the device cannot be measured; called before any work."""
        if device.type != "cuda":
            raise Mistake(
                f"bench={self.option} times sparse kernels on a GPU, and this run computes on the "
                f"{device.type}: use bench=none, or model.devices=cuda on a machine with one"
            )

    def needs_weights(self) -> bool:
        """Whether the benchmark uses the pruned weights themselves, which must then be in memory."""
        return False

    def ready(self, model: nn.Module) -> None:
        """Raises Mistake if the loaded model cannot be measured; called before it is pruned."""
        if self.needs_weights() and any(parameter.is_meta for parameter in model.parameters()):
            raise Mistake(
                "bench=model times the whole model, whose weights are read block by block: use model.store=memory"
            )

    @abstractmethod
    def run(self, subject: Subject) -> Measured:
        """Times dense against sparse."""


@dataclass(kw_only=True, slots=True)
class NoBench(Bench):
    """Times nothing."""

    def check(self, pattern: Pattern) -> None:
        pass

    def require(self, device: torch.device) -> None:
        pass

    def run(self, subject: Subject) -> Measured:
        return Measured()


def quartiles(which: str, timing: Timing | None) -> dict[str, Any]:
    """A row's entries for a timing apart from its median; all None without a timing."""
    return {
        f"{which}_low_ms": timing.low_ms if timing else None,
        f"{which}_high_ms": timing.high_ms if timing else None,
        f"{which}_graph": timing.graph if timing else None,
        f"{which}_calls": timing.calls * timing.repeats if timing else None,
    }


def in_words(row: dict[str, Any]) -> str:
    """A row of `latency` as a sentence."""
    what = (
        f"{row['phase']} of {row['sequences']} x {row['prompt']} tokens"
        if "phase" in row
        else (f"{row['layer']} {row['n']} x {row['k']} {row['dtype']}, {row['tokens']} tokens")
    )
    if row.get("why_not"):
        return f"{what}: {row['kernel']} was not timed: {row['why_not']}"
    limit = f", at most {row['limit_speedup']:.2f}" if "limit_speedup" in row else ""
    times = f"dense {row['dense_ms']:.4g} ms, {row['kernel']} {row['sparse_ms']:.4g} ms"
    return f"{what}: {times}, {row['speedup']:.2f} times as fast{limit}"


def distinct(layers: Sequence[LayerShape]) -> list[LayerShape]:
    """The first layer of each shape, with the number of layers of this shape."""
    seen: dict[tuple[int, int], LayerShape] = {}
    for layer in layers:
        shape = layer.rows, layer.inputs
        known = seen.get(shape, layer._replace(matrices=0))
        seen[shape] = known._replace(matrices=known.matrices + layer.matrices)
    return list(seen.values())
