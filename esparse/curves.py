"""Layers, tasks, latencies and zeros of many runs as pictures; each is None where the records have nothing for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from esparse.grid import Record, grid, keys, means
from esparse.plots import COLORS, MARKERS, looks, method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A value of one run at a place of the x axis.
Points = dict[Any, list[float]]


def errors(records: Sequence[Record]) -> Figure | None:
    """The mean relative error of each block's layers, along the depth of the model."""
    return _along_depth(records, "relative_error", "mean relative error of a block's layers")


def kept(records: Sequence[Record]) -> Figure | None:
    """The share of its layers' scores that survived, along the depth of the model."""
    return _along_depth(records, "kept_score", "mean kept score of a block's layers")


def tasks(records: Sequence[Record]) -> Figure | None:
    """Each task's score: dense as a bar behind, a marker with its standard error per method."""
    names = keys(records, "zeroshot")
    if not names:
        return None
    measured = [run for run in _runs(records) if run[2].get("zeroshot")]
    look = looks([name for _, name, _ in measured])
    figure, panels = _panels(measured, width=1.6 + 0.9 * len(names))
    for ax, runs in panels:
        step = 0.8 / len(runs)
        for place, task in enumerate(names):
            dense = [record["zeroshot"][task]["dense"] for _, record in runs if task in record["zeroshot"]]
            if dense:
                level = sum(dense) / len(dense)
                ax.hlines(level, place - 0.45, place + 0.45, color="black", linestyle="--", linewidth=1, label="dense")
        for k, (name, record) in enumerate(runs):
            there = [(i, record["zeroshot"][t]) for i, t in enumerate(names) if t in record["zeroshot"]]
            color, marker = look[name]
            ax.errorbar(
                [i + (k - (len(runs) - 1) / 2) * step for i, _ in there],
                [value["pruned"] for _, value in there],
                yerr=[value.get("stderr") or 0.0 for _, value in there],
                color=color, marker=marker, markersize=5, capsize=2, linestyle="none", label=name,
            )  # fmt: skip
        ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
        ax.set_ylabel("score of a task (higher is better)", fontsize=9)
    _same_heights([ax for ax, _ in panels])
    return _finished(figure)


def latency(records: Sequence[Record]) -> Figure | None:
    """Milliseconds against tokens, dense and sparse, a panel per shape of a layer."""
    rows = _latencies(records)
    if not rows:
        return None
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    figure, axes = _grid_of(len(shapes))
    for ax, (n, k) in zip(axes, shapes, strict=False):
        of_shape = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        lines = {"dense": _by_place((row["tokens"], row["dense_ms"]) for row in of_shape)}
        for row in of_shape:
            lines.setdefault(_kernel(row), {}).setdefault(row["tokens"], []).append(row["sparse_ms"])
        for i, (name, points) in enumerate(lines.items()):
            _line(ax, points, color=COLORS[i % len(COLORS)] if i else "black", marker=MARKERS[i % 7], label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(f"{n} × {k}", fontsize=10)
        ax.set_xlabel("tokens", fontsize=9)
        ax.set_ylabel("ms (lower is better)", fontsize=9)
    return _finished(figure)


def roofline(records: Sequence[Record]) -> Figure | None:
    """Useful work per second against work per byte of a dense layer in half precision, as measured.

    Work counts as of the dense product (2 · tokens · n · k), whatever a kernel leaves out; bytes are those of weight,
    input and output. No ceiling is drawn: none was measured.
    """
    rows = _latencies(records)
    if not rows:
        return None
    figure, (ax,) = _grid_of(1)
    lines: dict[str, Points] = {}
    for row in rows:
        tokens, n, k = row["tokens"], row["n"], row["k"]
        work = 2.0 * tokens * n * k
        intensity = work / (2 * (n * k + tokens * (n + k)))
        for name, ms in (("dense", row["dense_ms"]), (_kernel(row), row["sparse_ms"])):
            lines.setdefault(name, {}).setdefault(intensity, []).append(work / ms / 1e9)
    for i, (name, points) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)] if i else "black"
        _line(ax, points, color=color, marker=MARKERS[i % 7], label=name, linestyle="none")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("FLOP of the dense product per byte (16 bits a value)", fontsize=9)
    ax.set_ylabel("TFLOP/s of the dense product", fontsize=9)
    return _finished(figure)


def profile(records: Sequence[Record]) -> Figure | None:
    """The shares of zeros and of near zeros, before and after pruning, along depth: weights, activations, attention."""
    first = next((record for record in records if record.get("profile")), None)
    if first is None:
        return None
    rows, thresholds = first["profile"]["rows"], first["profile"]["thresholds"]
    kinds = [kind for kind in ("weight", "activation", "attention") if any(row["kind"] == kind for row in rows)]
    figure, axes = _grid_of(len(kinds))
    for ax, kind in zip(axes, kinds, strict=False):
        of_kind = [row for row in rows if row["kind"] == kind]
        for which, color, marker in (("dense", COLORS[0], "o"), ("pruned", COLORS[1], "s")):
            for threshold, style in zip(thresholds[::2], ("--", "-"), strict=True):
                points = _by_place((_depth(row["name"]), row[f"{which} {threshold:g}"]) for row in of_kind)
                label = f"{which}, x = 0" if threshold == 0 else f"{which}, |x| ≤ {threshold:g}"
                _line(ax, points, color=color, marker=marker, label=label, linestyle=style)
            ranges = {place: (min(values), max(values)) for place, values in sorted(points.items())}
            ax.fill_between(
                list(ranges), [low for low, _ in ranges.values()], [high for _, high in ranges.values()],
                color=color, alpha=0.15, linewidth=0,
            )  # fmt: skip
        ax.set_title(kind, fontsize=10)
        ax.set_xlabel("block", fontsize=9)
        ax.set_ylabel("share of values", fontsize=9)
        ax.set_ylim(-0.02, 1.02)
    return _finished(figure)


def _along_depth(records: Sequence[Record], field: str, what: str) -> Figure | None:
    runs = [run for run in _runs(records) if any(layer.get(field) is not None for layer in run[2].get("layers", []))]
    if not runs:
        return None
    look = looks([name for _, name, _ in runs])
    figure, panels = _panels(runs, width=3.6)
    for ax, of_panel in panels:
        lines: dict[str, Points] = {}
        for name, record in of_panel:
            for layer in record["layers"]:
                if layer.get(field) is not None and math.isfinite(layer[field]):
                    lines.setdefault(name, {}).setdefault(_depth(layer.get("name", "")), []).append(layer[field])
        for name, points in lines.items():
            _line(ax, points, color=look[name][0], marker=look[name][1], label=name)
        ax.set_xlabel("block", fontsize=9)
        ax.set_ylabel(what, fontsize=9)
    _same_heights([ax for ax, _ in panels])
    return _finished(figure)


def _runs(records: Sequence[Record]) -> list[tuple[str, str, Record]]:
    """Every run with its panel (model and pattern) and its method's name; runs with other seeds have the same."""
    table, by_id = grid(records), {record["id"]: record for record in records}
    merged = means(table)
    rows = table.rows
    return [(f"{row['model']}, {row['pattern']}", method(row, merged), by_id[row["id"]]) for row in rows]


def _panels(
    runs: Sequence[tuple[str, str, Record]], *, width: float
) -> tuple[Figure, list[tuple[Axes, list[tuple[str, Record]]]]]:
    names = list(dict.fromkeys(panel for panel, _, _ in runs))
    figure, axes = _grid_of(len(names), width=width)
    for ax, name in zip(axes, names, strict=False):
        ax.set_title(name, fontsize=10)
    return figure, [(ax, [run[1:] for run in runs if run[0] == name]) for ax, name in zip(axes, names, strict=False)]


def _grid_of(panels: int, *, width: float = 3.6) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = max(1, min(panels, int(11 // width)))
    rows = -(-panels // columns)
    figure = Figure(figsize=(columns * width + 2.4, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.set_axis_off()
    return figure, axes[:panels]


def _line(ax: Axes, points: Points, *, color: str, marker: str, label: str, linestyle: str = "-") -> None:
    """The mean at each place, in the order of the places."""
    places = sorted(points)
    middle = [sum(points[place]) / len(points[place]) for place in places]
    ax.plot(places, middle, color=color, marker=marker, markersize=4, linewidth=1.3, linestyle=linestyle, label=label)


def _same_heights(axes: Sequence[Axes]) -> None:
    limits = [limit for ax in axes for limit in ax.get_ylim()]
    for ax in axes:
        ax.set_ylim(min(limits), max(limits))


def _finished(figure: Figure) -> Figure:
    from matplotlib.ticker import MaxNLocator

    for ax in figure.axes:
        if ax.get_xlabel() == "block":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    handles = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    ordered = sorted(handles, key=lambda label: label == "dense")
    figure.legend([handles[o] for o in ordered], ordered, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _latencies(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows that were measured in full: a kernel that a machine lacks has no time."""
    needed = ("tokens", "n", "k", "dense_ms", "sparse_ms")
    rows = [row for record in records for row in record.get("latency") or []]
    return [row for row in rows if all(isinstance(row.get(n), int | float) and row[n] > 0 for n in needed)]


def _kernel(row: dict[str, Any]) -> str:
    return str(row.get("kernel") or "sparse")


def _by_place(pairs: Iterable[tuple[Any, float]]) -> Points:
    points: Points = {}
    for place, value in pairs:
        points.setdefault(place, []).append(value)
    return points


def _depth(name: str) -> int:
    """The block that a layer's name begins with: model.layers.3.self_attn.q_proj is in block 3."""
    numbers = re.findall(r"\.(\d+)\.|\.(\d+)$", f"{name}")
    return int(next(filter(None, numbers[0]))) if numbers else 0
