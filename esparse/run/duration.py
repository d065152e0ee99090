"""How long a run's passes through the model take at least: its arithmetic and its bytes, over the rates of a machine.

The rates of this machine are measured in a second, with one product and one copy; those of a GPU that is not here are
the published ones (assets/gpus.json, with sources), which no program reaches: the time is then a lower bound.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from esparse.models.load import ASSETS

if TYPE_CHECKING:
    import torch

MEASURE_S = 0.5  # seconds of each of the two measurements
ROWS, INNER, COLUMNS = 1024, 2048, 2048  # of the product that is timed
COPIED = 2**27  # bytes


@dataclass(kw_only=True, frozen=True, slots=True)
class Work:
    """What the passes of a run take: arithmetic (FLOP) and bytes that are read and written."""

    calibration: int  # FLOP
    statistics: int  # FLOP
    evaluation: int  # FLOP
    moved: int  # bytes, without those of trainings
    training: int = 0  # FLOP
    not_counted: tuple[str, ...] = ()  # corpora whose tokens are not known before they are read

    @property
    def arithmetic(self) -> int:
        return self.calibration + self.statistics + self.training + self.evaluation


@dataclass(kw_only=True, frozen=True, slots=True)
class Rates:
    """What a machine does: FLOP and bytes per second. `memory`: bytes of a GPU."""

    name: str
    arithmetic: float
    copy: float
    memory: float | None = None
    source: str | None = None  # None: measured here

    def seconds(self, work: Work) -> float:
        """Arithmetic and bytes one after the other."""
        return work.arithmetic / self.arithmetic + work.moved / self.copy


def gpus() -> dict[str, dict[str, Any]]:
    """The GPUs whose rates are known, by the names of dry_run=..."""
    known: dict[str, Any] = json.loads((ASSETS / "gpus.json").read_text(encoding="utf-8"))
    return {name: rates for name, rates in known.items() if isinstance(rates, dict)}


def published(name: str) -> Rates:
    """The rates of a GPU as its maker publishes them."""
    rates = gpus()[name]
    return Rates(
        name=rates["name"],
        arithmetic=rates["tflops"] * 1e12,
        copy=rates["gb_per_s"] * 1e9,
        memory=rates["gb"] * 1e9,
        source=rates["source"],
    )


@cache
def measured(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of this machine, measured in about a second."""
    import torch

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    left_RI = torch.randn(ROWS, INNER, device=device, dtype=torch.float32).to(dtype)
    right_IC = torch.randn(INNER, COLUMNS, device=device, dtype=torch.float32).to(dtype)
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = _per_second(lambda: left_RI @ right_IC, settle)
    copies = _per_second(lambda: target.copy_(source), settle)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
    return Rates(name=name, arithmetic=2.0 * ROWS * INNER * COLUMNS * products, copy=2.0 * COPIED * copies)


def _per_second(call: Callable[[], Any], settle: Callable[[], None]) -> float:
    """How often a second; the first call, which sets things up, is not counted."""
    call()
    settle()
    began, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < MEASURE_S or not calls:
        call()
        settle()
        calls += 1
    return calls / elapsed
