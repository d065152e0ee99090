"""Chooses tiles for the matrix-vector kernels: candidates by shape, and trials on the device.

Shapes: R rows, K kept weights of a row, B bytes of a row's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from esparse.kernels.form import units

_fastest: dict[Hashable, Tile] = {}


@dataclass(frozen=True, slots=True)
class Tile:
    """The piece that one program of a kernel takes at a time: `depth` runs of each of `rows` rows."""

    kernel: str  # gather | expand | select | spread (the last two: registers.py)
    rows: int
    depth: int
    warps: int
    split: int = 1  # programs that share the runs of a row


def candidates(rows: int, inputs: int, tokens: int, *, n: int, m: int, in_registers: bool) -> list[Tile]:
    """Tiles to try on a shape, the likely fastest first."""
    cut = units(n, m)
    assert cut is not None
    runs = -(-inputs // cut.columns)
    # Few rows make too few programs for a large GPU, so several programs share a row.
    splits = [1] if rows >= 8192 else [1, 2] if rows >= 2048 else [1, 4, 8]
    if in_registers:
        # A thread holds one or two runs at a time, so that many threads fit into a multiprocessor.
        few = ((4, 32, 4), (8, 32, 8), (2, 64, 4), (8, 64, 16), (1, 64, 2), (8, 16, 2), (4, 64, 8))
        if tokens == 1 or (n == 2 and tokens == 2):
            kernel = "select" if n == 2 else "gather"
            return [Tile(kernel, r, d, w, s) for s in splits[:2] for r, d, w in few if d * s <= max(runs, 16)]
        many = ((64, 8, 8), (64, 8, 4), (32, 16, 4), (32, 8, 4), (64, 4, 4), (128, 4, 8))
        tiles = [Tile("spread", r, d, w, s) for s in (1, 2, 4, 8) for r, d, w in many if d * s * 2 <= max(runs, 16)]
        return [*tiles, Tile("select", 8, 32, 8), Tile("select", 4, 32, 4)] if n == 2 and tokens <= 4 else tiles
    some = ((8, 16, 4), (8, 32, 8), (32, 16, 4), (8, 16, 2), (8, 64, 4))
    tiles = [Tile("gather", r, d, w, s) for s in splits for r, d, w in some if d * s <= max(runs, 16)]
    if tokens > 2:
        deep = ((16, 16, 4), (64, 8, 4), (64, 4, 4))
        wide = [Tile("expand", r, d, w, s) for s in sorted({*splits, 2}) for r, d, w in deep]
        tiles = tiles + wide if tokens < 8 else wide + tiles[:4]
    return tiles


def is_known(key: Hashable) -> bool:
    """Whether the fastest tile of this key is in the cache."""
    return key in _fastest


def fastest(key: Hashable, tiles: Iterable[Tile], calls: Callable[[Tile], list[Callable[[], Tensor]]]) -> Tile:
    """The tile whose calls take the least time on this device (cached by `key`); the first if none can be timed."""
    if key in _fastest:
        return _fastest[key]
    tiles = list(tiles)
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return tiles[0]
    times = {tile: _milliseconds(calls(tile)) for tile in tiles}
    _fastest[key] = min(times, key=lambda tile: times[tile])
    return _fastest[key]


def copies(values_RK: Tensor, bits_RB: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Enough copies of the weights that none is still in the cache at its turn, as in a model's many layers."""
    if not values_RK.is_cuda:
        return [(values_RK, bits_RB)]
    cache = torch.cuda.get_device_properties(values_RK.device).L2_cache_size
    count = min(32, 1 + 2 * cache // (values_RK.nbytes + bits_RB.nbytes))
    return [(values_RK.clone(), bits_RB.clone()) for _ in range(count)]


def _milliseconds(calls: list[Callable[[], Tensor]]) -> float:
    """The time of five rounds of all calls in a CUDA graph; single calls would time the host's launches instead."""

    def through() -> None:
        for call in calls:
            call()

    try:
        through()
    except triton.runtime.errors.OutOfResources:  # more registers or shared memory than this device has
        return float("inf")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        through()
    graph.replay()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return min(times)
