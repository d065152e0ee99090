"""What a person sees while a run goes on: a bar on a terminal, lines in a pipe and in the log file."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from esparse.records.report import LayerReport

log = logging.getLogger("esparse")

ALL_STEPS = 1e9  # seconds over which the bar takes its mean: a block may take minutes, and rich's own are 30
LINE_EVERY_S = 30.0  # between two lines about one measurement


class _Steps(MofNCompleteColumn):
    """Nothing where nobody counts the steps."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text("")


class Progress:
    """One bar: the stage by name, its steps, and the time left from the second one on. Without a terminal, lines.

    `run`: which one of a sweep, for instance `run 3 of 6`. A stage whose steps nobody counts has a bar that moves.
    """

    def __init__(self, blocks: int, *, shown: bool = True, run: str = "") -> None:
        self._blocks = blocks
        self._run = f"{run}: " if run else ""
        self._console = Console(file=sys.stderr)  # as it is now: others may be silenced meanwhile
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            _Steps(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("[dim]{task.fields[layer]}"),
            console=self._console,
            transient=True,
            speed_estimate_period=ALL_STEPS,
            disable=not (shown and self._console.is_terminal),
        )
        self._level = logging.DEBUG if self._console.is_terminal else logging.INFO
        self._task: TaskID | None = None
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._layers: list[LayerReport] = []
        self._block = 0
        self._stage = 0.0  # when this stage began
        self._began = 0.0  # when the first layer of this stage was done
        self._first = 0  # its block
        self._latest = 0.0  # when the first layer of the block at work was done

    def __enter__(self) -> Progress:
        self._bar.start()
        if not self._bar.disable:  # lines of the log then come above the bar, not into it
            handlers = [handler for handler in log.handlers if type(handler) is logging.StreamHandler]
            self._streams = [(handler, handler.setStream(sys.stderr)) for handler in handlers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handler, stream in self._streams:
            if stream is not None:
                handler.setStream(stream)
        self._bar.stop()

    def stage(self, name: str) -> None:
        """A stage without steps begins: a profile, a benchmark, an export."""
        self._begin(name, total=None)

    def evaluating(self, what: str) -> Callable[[int], None]:
        """A measurement begins; returns what to call after each block."""
        name = f"measuring {what}"
        self._begin(name, total=self._blocks)
        began = printed = time.monotonic()

        def on_block(index: int) -> None:
            nonlocal printed
            self._update(completed=index + 1)
            now = time.monotonic()
            if now - printed < LINE_EVERY_S and index + 1 < self._blocks:
                return
            printed = now
            elapsed = now - began
            left = elapsed / (index + 1) * (self._blocks - index - 1)
            log.log(self._level, "%s, block %d of %d%s", name, index + 1, self._blocks, _times(elapsed, left))

        return on_block

    def pruning(self) -> None:
        """The block loop begins."""
        self._begin("pruning", total=self._blocks)
        self._stage, self._began = time.monotonic(), 0.0

    def layer(self, block: int, layer: LayerReport) -> None:
        """A layer of that block is done."""
        now = time.monotonic()
        if not self._began:
            self._began, self._first, self._latest = now, block, now
            self._block = block
        if block != self._block:
            self._latest = now
            self.block_done(at=block)
            self._block = block
        self._layers.append(layer)
        self._update(completed=block, layer=_short(layer.name))

    def block_done(self, at: int | None = None) -> None:
        """Logs the block whose layers came in. `at`: the block that is at work now; None: it was the last one."""
        if not self._layers:
            return
        errors = [layer.relative_error for layer in self._layers if layer.relative_error is not None]
        mean = f"{sum(errors) / len(errors):.3f}" if errors else "not measured"
        elapsed, left = time.monotonic() - self._stage, 0.0
        if at is not None:
            left = (self._latest - self._began) / (at - self._first) * (self._blocks - at)
        log.log(
            self._level,
            "block %d of %d: %d layers, mean relative error %s, %.1f s%s",
            self._block + 1,
            self._blocks,
            len(self._layers),
            mean,
            sum(layer.seconds for layer in self._layers),
            _times(elapsed, left),
        )
        self._layers = []

    def _begin(self, name: str, *, total: int | None) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        what = f"{self._run}{name}, block" if total else f"{self._run}{name}"
        self._task = self._bar.add_task(what, total=total, layer="")
        if not total:
            log.log(self._level, "%s", name)

    def _update(self, **values: Any) -> None:
        if self._task is not None:
            self._bar.update(self._task, **values)


def _times(elapsed: float, left: float) -> str:
    """How long a stage has taken and will take, for the end of a line."""
    return f"; {clock(elapsed)} elapsed" + (f", about {clock(left)} left" if left else "")


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 where it is less than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(name: str) -> str:
    """The layer's name inside its block: self_attn.v_proj."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]
