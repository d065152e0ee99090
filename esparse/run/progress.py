"""What a person sees while a run goes on: a bar on a terminal, a line per block in a log file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from esparse.records.report import LayerReport

log = logging.getLogger("esparse")


class Progress:
    """One bar: the block at work, its layers, and the time left. Without a terminal each block is a line."""

    def __init__(self, blocks: int, *, shown: bool = True) -> None:
        self._blocks = blocks
        self._console = Console(file=sys.stderr)  # as it is now: others may be silenced meanwhile
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[layer]}"),
            console=self._console,
            transient=True,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=blocks, layer="")
        self._layers: list[LayerReport] = []
        self._block = 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def evaluating(self, what: str) -> Callable[[int], None]:
        """Starts the bar anew for one measurement; returns what to call after each block."""
        self._bar.reset(self._task, description=f"measuring {what}", layer="")
        return lambda index: self._bar.update(self._task, completed=index + 1)

    def pruning(self) -> None:
        """Starts the bar anew for the block loop."""
        self._bar.reset(self._task, description="pruning, block", layer="")

    def layer(self, block: int, layer: LayerReport) -> None:
        """A layer of that block is done."""
        if block != self._block:
            self.block_done()
            self._block = block
        self._layers.append(layer)
        self._bar.update(self._task, completed=block, layer=layer.name)

    def block_done(self) -> None:
        """Logs the block whose layers came in."""
        if not self._layers:
            return
        errors = [layer.relative_error for layer in self._layers if layer.relative_error is not None]
        mean = f"{sum(errors) / len(errors):.3f}" if errors else "not measured"
        log.log(
            logging.DEBUG if self._console.is_terminal else logging.INFO,
            "block %d of %d: %d layers, mean relative error %s, %.1f s",
            self._block + 1,
            self._blocks,
            len(self._layers),
            mean,
            sum(layer.seconds for layer in self._layers),
        )
        self._layers = []
