"""Builds the record of a run at its end: environment, time and memory, measurements."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import resource
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esparse import __version__
from esparse.export.packed_checkpoint import stacks_of, why_dense
from esparse.packed import grid_sizes
from esparse.packed.sizes import of_codes, of_matrix
from esparse.patterns import Pattern
from esparse.pruning.journal import Journal
from esparse.pruning.outcome import Pruned
from esparse.quantise.grids import Grid
from esparse.records.report import LayerReport, Stages, as_dicts, nothing_to_wait_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE_DEPENDS_ON = ("torch", "transformers", "lm_eval", "esparse", "commit")  # of the environment


def environment(device: torch.device, devices: int = 1) -> dict[str, Any]:
    """Versions, device, host, and the commit of the checkout that esparse runs from (with + if it was edited)."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "lm_eval": _version("lm_eval"),
        "esparse": __version__,
        "device": kind if devices == 1 else f"{devices} x {kind}",
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    """The version of a package of an extra; None if it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


@functools.cache  # cached, because a process runs the code that it has imported
def _commit() -> str | None:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return described.stdout.strip() or None
    return None


@dataclass(slots=True)
class Clock:
    """The start of a run, and the time of this and earlier attempts."""

    stages: Stages
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    _began: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(cls, device: torch.device) -> Clock:
        """Also resets the device's peak of memory."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return cls(Stages(settle=waiting_for(device)))

    def read(self, journal: Journal) -> dict[str, Any]:
        """Seconds until now, in all and by stage."""
        by_stage = journal.with_earlier(self.stages)
        return {
            "seconds": round(time.perf_counter() - self._began + sum(journal.seconds.values()), 3),
            "seconds_by_stage": {stage: round(seconds, 3) for stage, seconds in by_stage.items()},
        }


def waiting_for(device: torch.device) -> Callable[[], None]:
    """Waits, when it is called, until the device has done what it was given; can be pickled."""
    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else nothing_to_wait_for


@dataclass(frozen=True, slots=True)
class Size:
    """Facts about a model, taken before it is changed."""

    family: str
    parameters: int
    bytes: int
    element_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Size:
        parameters = list(model.parameters())
        return cls(
            family=model.config.model_type,
            parameters=sum(p.numel() for p in parameters),
            bytes=sum(p.nbytes for p in parameters),
            element_bytes=model.dtype.itemsize,
        )


def build(
    asked: dict[str, Any],
    sources: dict[str, Any],
    model: str,
    size: Size,
    pruned: Pruned,
    *,
    pattern: Pattern,
    measured: dict[str, Any],
    clock: Clock,
    journal: Journal,
    mask_bytes: int,
    peaks: Sequence[tuple[float, float | None]],
) -> dict[str, Any]:
    """The record of a run that is about to finish; timings and the export are added later.

    `asked`: id, name, config and environment. `sources`: digests of what was read from the disk. `model`: its name.
    `measured`: the sections that measuring reports. `peaks` as in `memory`.
    """
    seconds, layers = clock.read(journal), with_bytes(pruned)
    return {
        "id": asked["id"],
        "name": asked["name"],
        "status": "finished",
        "started": clock.started,
        "seconds": seconds["seconds"],
        "resumed": journal.resumed,
        "config": asked["config"],
        "environment": asked["environment"],
        "sources": sources,
        "model": {
            "name": model,
            "family": size.family,
            "parameters": size.parameters,
            "pruned_parameters": pruned.weights,
        },
        "sparsity": sparsity(pattern, pruned),
        **measured,
        "layers": as_dicts(layers),
        "recovery": as_dicts(pruned.recoveries),
        "seconds_by_stage": seconds["seconds_by_stage"],
        "memory": memory(size, pruned, layers, mask_bytes, peaks),
    }


def peak_mib(device: torch.device) -> tuple[float, float | None]:
    """The peak memory of this process on the host and on the device."""
    unit = 1 if platform.system() == "Darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return round(host / 2**20, 1), None if on_device is None else round(on_device / 2**20, 1)


def with_bytes(pruned: Pruned) -> list[LayerReport]:
    """The report of each layer, with the bytes of its matrix now and in the form of `export=packed`."""
    layers, grid = [], pruned.grid
    dense = {name for name, experts in stacks_of(pruned).items() if why_dense(experts) is not None}
    for layer, (matrix, grouping) in zip(pruned.layers, pruned.groupings, strict=True):
        pattern, dtype = grouping.pattern, matrix.parameter.dtype
        layer = replace(layer, dense_bytes=math.prod(layer.shape) * dtype.itemsize)
        if matrix.entry not in dense and (pattern.parts() or (grid is not None and str(pattern) == "dense")):
            shape = (pattern, layer.shape[0], layer.shape[1], dtype)
            size = of_matrix(*shape) if grid is None else of_codes(*shape, grid)
            layer = replace(layer, packed_bytes=size.in_memory, file_bytes=size.on_disk)
        layers.append(layer)
    return layers


def sparsity(pattern: Pattern, pruned: Pruned) -> dict[str, Any]:
    """Measurements on the weights: density, whether the pattern holds, the dense rest of the blocks."""
    return {
        "pattern": str(pattern),
        "density": pruned.kept / pruned.weights,
        "pattern_holds": pruned.pattern_holds,
        "share_of_blocks": pruned.share_of_blocks,
        "left_dense": dict(list(pruned.left_dense.items())[:20]),
    }


def memory(
    size: Size,
    pruned: Pruned,
    layers: Sequence[LayerReport],
    mask_bytes: int,
    peaks: Sequence[tuple[float, float | None]],
) -> dict[str, Any]:
    """Peaks in MiB, and the bytes of the model's tensors dense and bit-mask packed; `layers` as `with_bytes` has them.

    `peaks` of each process: those of the host are added, of the devices the fullest one counts.
    Packed: the surviving values in the model's precision, the bit masks of pruned matrices, and all that is not pruned.
    packed_bytes, file_bytes: with all layers that `export=packed` packs as they are in memory and on disk then.
    order_bytes: the int32 channel orders of a shuffle, one for each tensor that is read in an order; the above and
    bits_per_weight count them, although those that earlier rows absorb take nothing: only an export finds out which.
    metadata_bits: what the pattern needs at least to say which weights survive, per pruned weight (0.75 at 2:4);
    bits_per_weight: that and the surviving values. Of quantised weights it is all that their codes take on disk,
    which `bits` has by what it is for; sparse_bytes then counts that.
    """
    sparse = size.bytes - (pruned.weights - pruned.kept) * size.element_bytes + mask_bytes
    metadata_bits = pruned.metadata_bits / pruned.weights
    orders = _order_bytes(pruned)
    order_bits = 8 * sum(orders)
    bits_per_weight = (8 * size.element_bytes * pruned.kept + order_bits) / pruned.weights + metadata_bits
    quantised: dict[str, Any] = {}
    if pruned.grid is not None:
        bits = _grid_bits(pruned, pruned.grid) + Counter(orders=order_bits)
        bits_per_weight = sum(bits.values()) / pruned.weights
        quantised = {"bits": grid_sizes.per_weight(bits, pruned.weights)}
        sparse = size.bytes - pruned.weights * size.element_bytes + -(-sum(bits.values()) // 8)
    packable = [layer for layer in layers if layer.packed_bytes is not None]
    rest = size.bytes - sum(layer.dense_bytes for layer in packable)
    rest += sum(of for of, layer in zip(orders, layers, strict=True) if layer.packed_bytes is not None)
    return {
        "peak_host_mib": round(sum(host for host, _ in peaks), 1),
        "peak_device_mib": max((on_device for _, on_device in peaks if on_device is not None), default=None),
        "dense_bytes": size.bytes,
        "sparse_bytes": sparse,
        "saving": 1 - sparse / size.bytes,
        "packed_bytes": rest + sum(layer.packed_bytes or 0 for layer in packable),
        "file_bytes": rest + sum(layer.file_bytes or 0 for layer in packable),
        "order_bytes": sum(orders),
        "metadata_bits": metadata_bits,
        "bits_per_weight": bits_per_weight,
        **quantised,
    }


def _order_bytes(pruned: Pruned) -> list[int]:
    """The bytes of the order in which each matrix's input is read; 0 if the matrix before it reads the same.

    Matrices of one input group stand side by side. Experts of one parameter have their orders one by one.
    """
    found, last = [], None
    for matrix, grouping in pruned.groupings:
        order_I, alone = grouping.order_I, matrix.expert is not None
        if order_I is None or (not alone and (_same(order_I, last) or _is_own(order_I))):
            found.append(0)
        else:
            found.append(4 * len(order_I))
        last = None if alone else order_I
    return found


def _same(order_I: Tensor, other_I: Tensor | None) -> bool:
    return other_I is not None and torch.equal(order_I.cpu(), other_I.cpu())


def _is_own(order_I: Tensor) -> bool:
    """Whether the order is the channels' own, which no export gathers."""
    return torch.equal(order_I.cpu().long(), torch.arange(len(order_I)))


def _grid_bits(pruned: Pruned, grid: Grid) -> Counter[str]:
    """The bytes of all quantised matrices, by purpose."""
    total: Counter[str] = Counter()
    for matrix, grouping in pruned.groupings:
        shape, kept = matrix.view().shape, None
        if not grouping.pattern.parts():
            keep = pruned.keeps[matrix.entry]
            kept = int((keep if matrix.expert is None else keep[matrix.expert]).sum())
        total.update(grid_sizes.stored_bits(grouping.pattern, shape[0], shape[1], grid, kept))
    return total
