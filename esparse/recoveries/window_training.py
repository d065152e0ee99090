"""The training of `recovery=window`: records targets while the block is dense, and trains after it is pruned.

Each window is trained on the output of its last module (its tap): a submodule with matrices (in most families the
attention), and for the matrices after it the whole block. The last window thus also repairs errors that earlier windows
left. Shapes: B sequences of a micro-batch, L tokens, H hidden width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.training import at_rate, improved, in_float32, in_half, masked, rate, requiring_grad
from esparse.records.report import RecoveryReport
from esparse.recoveries import Finish

if TYPE_CHECKING:
    from esparse.recoveries.window import Window


class _Reached(Exception):
    """Ends a block's forward at the tap."""


@dataclass(slots=True, eq=False)
class _Part:
    """One window of a block."""

    name: str
    tap: nn.Module | None  # the submodule whose output is compared; None: the block
    parameters: dict[str, nn.Parameter]


@dataclass(slots=True, eq=False)
class _Task:
    """One window to train, with its inputs and targets by micro-batch."""

    part: _Part
    index: int
    stream: Activations
    targets: list[Tensor]
    half: bool  # whether products are computed in bfloat16

    def output(self, batch: int) -> Tensor:
        """The window's output for one micro-batch (float32, differentiable)."""
        where = self.stream.blocks.device.type
        with torch.autocast(where, torch.bfloat16, enabled=self.half), _tapped([self.part.tap], stop=True) as seen:
            try:
                return self.stream.forward(self.index, batch, torch.float32).float()
            except _Reached:
                return seen[0].float()

    def loss(self, batch: int) -> Tensor:
        """The mean squared error of one micro-batch."""
        out_BLH = self.output(batch)
        return mse_loss(out_BLH, self.targets[batch].to(out_BLH.device, torch.float32))

    @torch.no_grad()
    def mean_loss(self) -> float:
        sizes = [len(target) for target in self.targets]
        losses = [float(self.loss(batch)) * size for batch, size in enumerate(sizes)]
        return sum(losses) / sum(sizes)


def begin(settings: Window, block: Block) -> Finish:
    """Records the targets of a dense block; returns the function that trains the block after pruning."""
    stream = block.dense if settings.inputs == "dense" else block.activations
    source = block.dense if settings.targets == "parent" else stream
    assert stream is not None
    assert source is not None
    parts = list(_parts(block, settings.window))
    targets = _targets(source, block.index, [part.tap for part in parts])
    half = in_half(settings.products, next(iter(block.matrices().parameters().values())).dtype)

    def finish(keeps: Mapping[str, Tensor]) -> list[RecoveryReport]:
        reports = []
        with in_float32(block.module):
            for part, wanted in zip(parts, targets, strict=True):
                task = _Task(part, block.index, stream, wanted, half)
                reports += _trained(settings, task, keeps, seed=block.seed * 1_000_003 + block.index)
        return reports

    return finish


def _parts(block: Block, window: str) -> Iterator[_Part]:
    """The windows of a block: submodules with matrices, then all other matrices, with the block's output as tap."""
    left = {f"{block.name}.{name}": parameter for name, parameter in block.module.named_parameters()}
    if window == "submodule":
        masked = set(block.matrices().parameters())
        inside = {
            name: (child, {entry for entry in left if entry.startswith(f"{block.name}.{name}.")})
            for name, child in block.module.named_children()
            if list(child.children())  # OPT's fc1 and fc2 are direct children of the block
        }
        inside = {name: (child, entries) for name, (child, entries) in inside.items() if entries & masked}
        outside = masked.difference(*(entries for _, entries in inside.values()))
        if not outside:
            inside.popitem()  # the last submodule belongs to the window with the block's output
        for name, (child, entries) in inside.items():
            yield _Part(f"{block.name}.{name}", child, {entry: left.pop(entry) for entry in sorted(entries)})
    yield _Part(block.name, None, left)


@torch.no_grad()
def _targets(source: Activations, index: int, taps: Sequence[nn.Module | None]) -> list[list[Tensor]]:
    """The dense block's outputs at each tap, by tap and micro-batch, on the host."""
    found: list[list[Tensor]] = [[] for _ in taps]
    for batch in range(len(source.hidden)):
        with _tapped(taps, stop=False) as seen:
            out = source.run(index, batch)
        for i, tap in enumerate(taps):
            found[i].append((out if tap is None else seen[i]).cpu())
    return found


@contextmanager
def _tapped(taps: Sequence[nn.Module | None], *, stop: bool) -> Iterator[dict[int, Tensor]]:
    """While open, records the taps' outputs, by index in `taps`."""
    seen: dict[int, Tensor] = {}

    def remember(place: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            seen[place] = out[0] if isinstance(out, tuple) else out
            if stop:
                raise _Reached

        return keep

    hooks = [tap.register_forward_hook(remember(i)) for i, tap in enumerate(taps) if tap is not None]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _trained(settings: Window, task: _Task, keeps: Mapping[str, Tensor], *, seed: int) -> list[RecoveryReport]:
    """Trains one window; restores its weights if the loss has risen."""
    # The mask is taken from the zeros in the stored weight, so that the layer's layout does not matter.
    pruned = {name: p for name, p in task.part.parameters.items() if name in keeps}
    trained = list((task.part.parameters if settings.train == "all" else pruned).values())
    if not pruned:
        return []
    start = time.perf_counter()
    kept = {parameter: parameter.data != 0 for parameter in pruned.values()}

    def train() -> int:
        with requiring_grad(task.stream.blocks.blocks[task.index], trained), masked(kept):
            return _steps(settings, task, trained, torch.Generator().manual_seed(seed))

    before, after, steps = improved(task.part.name, trained, task.mean_loss, train)
    return [RecoveryReport(task.part.name, "mse", before, after, steps, time.perf_counter() - start)]


def _steps(settings: Window, task: _Task, trained: list[nn.Parameter], generator: torch.Generator) -> int:
    """Runs AdamW over the micro-batches; returns the number of steps."""
    groups = at_rate(trained, settings.learning_rate, scaled=settings.scaled)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay)
    # Micro-batches may be smaller than a step's batch, if a metric or the device requires it.
    together = math.ceil(settings.batch / len(task.targets[0]))
    total = settings.epochs * math.ceil(len(task.targets) / together)
    shape: dict[str, Any] = {"warm_up": settings.warm_up, "decay": settings.decay, "final": settings.final_rate}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, total, **shape))
    for _ in range(settings.epochs):
        order = torch.randperm(len(task.targets), generator=generator).tolist()
        for first in range(0, len(order), together):
            batches = order[first : first + together]
            for batch in batches:
                (task.loss(batch) / len(batches)).backward()
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(trained, settings.clip)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return total
