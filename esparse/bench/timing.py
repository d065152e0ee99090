"""Times calls on a device: warmed up, with tensors that rotate beyond the cache, interleaved, median and quartiles.

Short calls are captured into one CUDA graph, so that gaps between launches do not count. Alternatives are timed in turn
(A, B, A, B), so that a drifting clock rate affects both.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]


class Clock(Protocol):
    """Measures a device's time; tests use a fake one."""

    @property
    def cache_bytes(self) -> int:
        """The size of the last cache before the memory."""

    def milliseconds(self, run: Call) -> float:
        """The time that `run` takes on the device."""

    def graphed(self, run: Call) -> Call | None:
        """`run` as one graph; None if it cannot be captured."""


class CudaClock:
    """CUDA events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def cache_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def milliseconds(self, run: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def graphed(self, run: Call) -> Call | None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:  # a call in it waits for the device
            torch.cuda.synchronize(self.device)
            return None
        return graph.replay


class WallClock:
    """Wall-clock time, for trials without a GPU."""

    cache_bytes = 0

    def milliseconds(self, run: Call) -> float:
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)

    def graphed(self, run: Call) -> Call | None:
        return None


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: median and quartiles of `repeats` measurements of `calls` calls each."""

    ms: float
    low_ms: float
    high_ms: float
    repeats: int
    calls: int
    graph: bool


@dataclass(frozen=True, slots=True)
class Protocolled:
    """How calls are timed; the numbers come from a benchmark's settings."""

    warm_up: int  # replays that do not count
    repeats: int  # replays that count
    least_ms: float  # least milliseconds of one replay
    graph_below_ms: float  # shorter calls are captured into a graph


def rotation(bytes_of_one: int, clock: Clock, *, most_bytes: int = 4 << 30) -> int:
    """The number of copies of a call's tensors to rotate, so that none is still in the cache at its turn.

    Together they take four times the cache, but at most `most_bytes`.
    """
    wanted = math.ceil(4 * clock.cache_bytes / max(1, bytes_of_one))
    return max(1, min(wanted, most_bytes // max(1, bytes_of_one), 256))


def measure(cases: Mapping[str, Sequence[Call]], clock: Clock, how: Protocolled) -> dict[str, Timing]:
    """The timing of each case; a case's calls do the same on different copies of their tensors."""
    replays, calls, graphs = {}, {}, {}
    for name, of in cases.items():
        replays[name], calls[name], graphs[name] = _replay(of, clock, how)
    for _ in range(how.warm_up):
        for replay in replays.values():
            replay()
    times: dict[str, list[float]] = {name: [] for name in cases}
    collecting = gc.isenabled()
    gc.disable()  # a garbage collection would count as some call's time
    try:
        for _ in range(how.repeats):
            for name, replay in replays.items():
                times[name].append(clock.milliseconds(replay) / calls[name])
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(times[name], calls[name], graphs[name]) for name in cases}


def _replay(of: Sequence[Call], clock: Clock, how: Protocolled) -> tuple[Call, int, bool]:
    """A replay for timing, the number of its calls, and whether it is a graph."""

    def through(turns: int) -> Call:
        def run() -> None:
            for _ in range(turns):
                for call in of:
                    call()

        return run

    through(2)()  # does what happens only the first time: compiling, searching, allocating
    one_ms = clock.milliseconds(through(1)) / len(of)
    turns = max(1, math.ceil(how.least_ms / max(one_ms * len(of), 1e-3)))
    turns = min(turns, max(1, 1024 // len(of)))
    if one_ms < how.graph_below_ms and (graph := clock.graphed(through(turns))) is not None:
        # Without gaps between launches, more calls may fit into a replay.
        graph_ms = clock.milliseconds(graph)
        if graph_ms < how.least_ms and turns * len(of) < 1024:
            more = min(math.ceil(turns * how.least_ms / max(graph_ms, 1e-3)), max(1, 1024 // len(of)))
            if (longer := clock.graphed(through(more))) is not None:
                graph, turns = longer, more
        return graph, turns * len(of), True
    return through(turns), turns * len(of), False


def _timing(times: Sequence[float], calls: int, graph: bool) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1, calls, graph)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, len(times), calls, graph)
