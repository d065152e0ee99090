"""Pictures of layers, tasks, latencies and zeros of many runs; each is None if the records have no data for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esparse.reports.figures.plots import COLORS, MARKERS, SIDE_BY_SIDE, legend, namer, styles
from esparse.reports.reading import Record, keys
from esparse.reports.tabulate import means, scored_by, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Bytes of a value at the input and at the output of a product, if they are not 2.
ELEMENT = {"int8": (1, 4), "float8_e4m3fn": (1, 2), "float32": (4, 4)}

PANELS = 24  # at most, of a picture with a panel per metric

# A value of one run at a place of the x axis.
Points = dict[Any, list[float]]


def errors(records: Sequence[Record]) -> Figure | None:
    """The mean relative error of each block's layers, along the depth of the model; of many methods the lowest."""
    return _along_depth(records, "relative_error", "mean relative error of a block's layers", best=min)


def kept(records: Sequence[Record]) -> Figure | None:
    """The share of its layers' scores that survived, along the depth of the model; of many methods the highest.

    A panel per metric, each with a range of its own: a metric's score says nothing of another's.
    """
    return _along_depth(records, "kept_score", "mean kept score of a block's layers", best=max, by_metric=True)


def tasks(records: Sequence[Record]) -> Figure | None:
    """Each task's score: dense as a bar behind, a marker with its standard error per run; of many methods the best."""
    names = keys(records, "zeroshot")
    if not names:
        return None
    measured = [run for run in _runs(records) if run[2].get("zeroshot")]
    measured, note = _few(
        measured, lambda record: _mean(task["pruned"] or 0.0 for task in record["zeroshot"].values()), max
    )
    style = styles([name for _, name, _ in measured])
    figure, panels = _panels(measured, width=1.6 + 0.9 * len(names))
    for ax, runs in panels:
        step = 0.8 / len(runs)
        for place, task in enumerate(names):
            of_runs = [record["zeroshot"].get(task, {}).get("dense") for _, record in runs]
            dense = [score for score in of_runs if score is not None]
            if dense:
                level = sum(dense) / len(dense)
                ax.hlines(level, place - 0.45, place + 0.45, color="black", linestyle="--", linewidth=1, label="dense")
        for k, (name, record) in enumerate(runs):
            scores = [(i, record["zeroshot"].get(t, {})) for i, t in enumerate(names)]
            known = [(i, value) for i, value in scores if value.get("pruned") is not None]
            color, marker = style[name]
            ax.errorbar(
                [i + (k - (len(runs) - 1) / 2) * step for i, _ in known],
                [value["pruned"] for _, value in known],
                yerr=[value.get("stderr") or 0.0 for _, value in known],
                color=color, marker=marker, markersize=5, capsize=2, linestyle="none", label=name,
            )  # fmt: skip
        turned: dict[str, Any] = {"rotation": 20, "ha": "right"} if len(names) > 1 else {}
        ax.set_xticks(range(len(names)), names, **turned)
        ax.set_ylabel("score of a task (higher is better)", fontsize=9)
    _same_heights([ax for ax, _ in panels])
    return finished(figure, note)


def latency(records: Sequence[Record]) -> Figure | None:
    """Milliseconds against tokens, dense and sparse, a panel per shape of a layer and dtype."""
    rows = timed_rows(records)
    if not rows:
        return None
    panels = list(dict.fromkeys((row["n"], row["k"], row.get("dtype")) for row in rows))
    style = _kernels(rows)
    figure, axes = grid_of(len(panels))
    for ax, (n, k, dtype) in zip(axes, panels, strict=False):
        inside = [row for row in rows if (row["n"], row["k"], row.get("dtype")) == (n, k, dtype)]
        lines = {"dense": _by_place((row["tokens"], row["dense_ms"]) for row in inside)}
        for row in inside:
            lines.setdefault(kernel_name(row, rows), {}).setdefault(row["tokens"], []).append(row["sparse_ms"])
        for name, points in lines.items():
            line(ax, points, color=style[name][0], marker=style[name][1], label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(", ".join(filter(None, (f"{n} × {k}", dtype))), fontsize=10)
        ax.set_xlabel("tokens", fontsize=9)
        ax.set_ylabel("ms (lower is better)", fontsize=9)
    return finished(figure)


def roofline(records: Sequence[Record]) -> Figure | None:
    """Useful work per second against work per byte of a dense layer, as measured, a panel per dtype.

    Work counts as of the dense product (2 · tokens · n · k), whatever a kernel leaves out; bytes are those of its
    weight, input and output. The roof is what the same runs measured: a copy's rate times the intensity, and the rate
    of a large dense product; a sparse kernel, which reads and computes less, may stand above it.
    """
    rows = timed_rows(records)
    if not rows:
        return None
    dtypes = list(dict.fromkeys(row.get("dtype") for row in rows))
    style = _kernels(rows)
    figure, axes = grid_of(len(dtypes))
    for ax, dtype in zip(axes, dtypes, strict=False):
        lines: dict[str, Points] = {}
        for row in (row for row in rows if row.get("dtype") == dtype):
            work, moved = work_of(row)
            for name, ms in (("dense", row["dense_ms"]), (kernel_name(row, rows), row["sparse_ms"])):
                lines.setdefault(name, {}).setdefault(work / moved, []).append(work / ms / 1e9)
        for name, points in lines.items():
            line(ax, points, color=style[name][0], marker=style[name][1], label=name, linestyle="none")
        _roofs(ax, records, dtype, sorted(place for points in lines.values() for place in points))
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(str(dtype or ""), fontsize=10)
        ax.set_xlabel("FLOP of the dense product per byte", fontsize=9)
        ax.set_ylabel("TFLOP/s of the dense product", fontsize=9)
    return finished(figure)


def with_layers(field: str) -> Callable[[Sequence[Record]], list[Record]]:
    """Which runs have a number of some layer."""
    return lambda records: [r for r in records if _mean(layer.get(field) for layer in r.get("layers", [])) is not None]


def with_tasks(records: Sequence[Record]) -> list[Record]:
    """The runs that were measured on tasks."""
    return [record for record in records if record.get("zeroshot")]


def first_profile(records: Sequence[Record]) -> list[Record]:
    """The first run that has a profile, alone."""
    return [record for record in records if record.get("profile")][:1]


def timed(records: Sequence[Record]) -> list[Record]:
    """The runs in which single layers were timed."""
    return [record for record in records if timed_rows([record])]


def work_of(row: dict[str, Any]) -> tuple[float, float]:
    """FLOP of the dense product of a timed row, and the bytes of its weight, input and output."""
    tokens, n, k = row["tokens"], row["n"], row["k"]
    element, result = ELEMENT.get(str(row.get("dtype")), (2, 2))
    return 2.0 * tokens * n * k, element * (n * k + tokens * k) + result * tokens * n


def _roofs(ax: Axes, records: Sequence[Record], dtype: str | None, places: Sequence[float]) -> None:
    """Each device's limit at these intensities, as its runs measured it."""
    roofs = {}
    for record in records:
        limits = record.get("limits") or {}
        flop_per_s = limits.get("flop_per_s", {}).get(dtype)
        if flop_per_s and limits.get("copy_bytes_per_s"):
            device = (record.get("environment") or {}).get("device", "the device")
            roofs[device] = (limits["copy_bytes_per_s"], flop_per_s)
    for i, (device, (bytes_per_s, flop_per_s)) in enumerate(roofs.items()):
        style = ("-", "--", ":", "-.")[i % 4]
        knee = flop_per_s / bytes_per_s
        corners = sorted({places[0], *([knee] if places[0] < knee < places[-1] else []), places[-1]})
        roof = [min(flop_per_s, bytes_per_s * place) / 1e12 for place in corners]
        ax.plot(corners, roof, color="#666666", linewidth=1.2, linestyle=style, label=f"limit of {device}", zorder=1)


def profile(records: Sequence[Record]) -> Figure | None:
    """The shares of zeros and of near zeros, before and after pruning, along depth: weights, activations, attention."""
    of = first_profile(records)
    if not of:
        return None
    first = of[0]
    rows, thresholds = first["profile"]["rows"], first["profile"]["thresholds"]
    kinds = [kind for kind in ("weight", "activation", "attention") if any(row["kind"] == kind for row in rows)]
    figure, axes = grid_of(len(kinds))
    for ax, kind in zip(axes, kinds, strict=False):
        of_kind = [row for row in rows if row["kind"] == kind]
        for which, color, marker in (("dense", COLORS[0], "o"), ("pruned", COLORS[1], "s")):
            for threshold, style in zip(thresholds[::2], ("--", "-"), strict=True):
                points = _by_place((block_of(row["name"]), row[f"{which} {threshold:g}"]) for row in of_kind)
                label = f"{which}, x = 0" if threshold == 0 else f"{which}, |x| ≤ {threshold:g}"
                line(ax, points, color=color, marker=marker, label=label, linestyle=style)
            ranges = {place: (min(values), max(values)) for place, values in sorted(points.items())}
            ax.fill_between(
                list(ranges), [low for low, _ in ranges.values()], [high for _, high in ranges.values()],
                color=color, alpha=0.15, linewidth=0,
            )  # fmt: skip
        ax.set_title(kind, fontsize=10)
        ax.set_xlabel("block", fontsize=9)
        ax.set_ylabel("share of values", fontsize=9)
        ax.set_ylim(-0.02, 1.02)
    return finished(figure, f"{first['name']} ({first['id']})")


def _along_depth(
    records: Sequence[Record], field: str, what: str, *, best: Callable[..., float], by_metric: bool = False
) -> Figure | None:
    def mean(record: Record) -> float | None:
        return _mean(layer.get(field) for layer in record.get("layers", []))

    runs = [run for run in _runs(records, by_metric=by_metric) if mean(run[2]) is not None]
    if not runs:
        return None
    runs, note = _few_of_each(runs, mean, best) if by_metric else _few(runs, mean, best)
    style = styles([name for _, name, _ in runs])
    figure, panels = _panels(runs, width=3.6)
    for ax, of_panel in panels:
        lines: dict[str, Points] = {}
        for name, record in of_panel:
            for layer in record["layers"]:
                if layer.get(field) is not None and math.isfinite(layer[field]):
                    lines.setdefault(name, {}).setdefault(block_of(layer.get("name", "")), []).append(layer[field])
        for name, points in lines.items():
            line(ax, points, color=style[name][0], marker=style[name][1], label=name)
        ax.set_xlabel("block", fontsize=9)
        ax.set_ylabel(what, fontsize=9)
    if not by_metric:
        _same_heights([ax for ax, _ in panels])
    return finished(figure, note)


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there and finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _few(
    runs: list[tuple[str, str, Record]], value: Callable[[Record], float | None], best: Callable[..., float]
) -> tuple[list[tuple[str, str, Record]], str]:
    """The runs of no more methods than lines can be told apart, and which these are, where some are left out.

    Those with the best mean value over seeds, by their places among the methods of each panel.
    """
    sign = 1 if best is min else -1
    values: dict[str, dict[str, list[float]]] = {}
    for panel, name, record in runs:
        values.setdefault(panel, {}).setdefault(name, []).append(sign * (value(record) or 0.0))
    places: dict[str, list[float]] = {}
    for of_panel in values.values():
        for place, name in enumerate(sorted(of_panel, key=lambda n: sum(of_panel[n]) / len(of_panel[n]))):
            places.setdefault(name, []).append(place / len(of_panel))
    if len(places) <= SIDE_BY_SIDE:
        return runs, ""
    ahead = sorted(places, key=lambda name: sum(places[name]) / len(places[name]))[:SIDE_BY_SIDE]
    which = "lowest" if best is min else "highest"
    return [run for run in runs if run[1] in ahead], f"the {SIDE_BY_SIDE} {which} of {len(places)} methods"


@dataclass(frozen=True, slots=True)
class Run:
    """A run as pictures call it: `method` as legends do, the same for other seeds; `scored`: by which metric."""

    id: str
    model: str
    pattern: str
    method: str
    scored: str
    record: Record


def named_runs(records: Sequence[Record]) -> list[Run]:
    """Every run, in the order of tables."""
    table, by_id = table_of(records), {record["id"]: record for record in records}
    name = namer(means(table))
    return [
        Run(row["id"], row["model"], row["pattern"], name(row), scored_by(row, table), by_id[row["id"]])
        for row in table.rows
    ]


def _few_of_each(
    runs: list[tuple[str, str, Record]], value: Callable[[Record], float | None], best: Callable[..., float]
) -> tuple[list[tuple[str, str, Record]], str]:
    """The same of each panel by itself, and of no more panels than a page has room for."""
    names = list(dict.fromkeys(panel for panel, _, _ in runs))
    few = [_few([run for run in runs if run[0] == name], value, best) for name in names[:PANELS]]
    which = "lowest" if best is min else "highest"
    note = [f"the first {PANELS} of {len(names)} panels"] if len(names) > PANELS else []
    note += [f"in each at most the {SIDE_BY_SIDE} {which}"] if any(left_out for _, left_out in few) else []
    return [run for of_panel, _ in few for run in of_panel], ", ".join(note)


def _runs(records: Sequence[Record], *, by_metric: bool = False) -> list[tuple[str, str, Record]]:
    """Every run with its panel (model and pattern, and the metric if asked for) and its method's name."""
    return [
        (", ".join([run.model, run.pattern, *([run.scored] if by_metric else [])]), run.method, run.record)
        for run in named_runs(records)
    ]


def _panels(
    runs: Sequence[tuple[str, str, Record]], *, width: float
) -> tuple[Figure, list[tuple[Axes, list[tuple[str, Record]]]]]:
    names = list(dict.fromkeys(panel for panel, _, _ in runs))
    figure, axes = grid_of(len(names), width=width)
    for ax, name in zip(axes, names, strict=False):
        ax.set_title(name, fontsize=10)
    return figure, [(ax, [run[1:] for run in runs if run[0] == name]) for ax, name in zip(axes, names, strict=False)]


def grid_of(panels: int, *, width: float = 3.6) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = max(1, min(panels, int(11 // width)))
    rows = -(-panels // columns)
    figure = Figure(figsize=(columns * width + 2.4, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.set_axis_off()
    return figure, axes[:panels]


def line(ax: Axes, points: Points, *, color: str, marker: str, label: str, linestyle: str = "-") -> None:
    """The mean at each place, in the order of the places."""
    places = sorted(points)
    middle = [sum(points[place]) / len(points[place]) for place in places]
    ax.plot(places, middle, color=color, marker=marker, markersize=4, linewidth=1.3, linestyle=linestyle, label=label)


def _same_heights(axes: Sequence[Axes]) -> None:
    limits = [limit for ax in axes for limit in ax.get_ylim()]
    for ax in axes:
        ax.set_ylim(min(limits), max(limits))


def finished(figure: Figure, note: str = "") -> Figure:
    from matplotlib.ticker import MaxNLocator

    for ax in figure.axes:
        if ax.get_xlabel() == "block":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    labels = dict.fromkeys(label for ax in figure.axes for label in ax.get_legend_handles_labels()[1])
    legend(figure, sorted(labels, key=lambda label: label == "dense"))
    if note:
        figure.suptitle(note, fontsize=10)
    return figure


def timed_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows that were measured in full: a kernel that a machine lacks has no time."""
    needed = ("tokens", "n", "k", "dense_ms", "sparse_ms")
    rows = [row for record in records for row in record.get("latency") or []]
    return [row for row in rows if all(isinstance(row.get(n), int | float) and row[n] > 0 for n in needed)]


def kernel_name(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The name in a legend: with the pattern if several were timed."""
    several = len({other.get("pattern") for other in rows}) > 1
    return " ".join(filter(None, (str(row.get("kernel") or "sparse"), row.get("pattern") if several else None)))


def _kernels(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Color and marker of the dense product and of each kernel, the same in every panel."""
    names = list(dict.fromkeys(kernel_name(row, rows) for row in rows))
    drawn = {name: (COLORS[i % len(COLORS)], MARKERS[(i + 1) % len(MARKERS)]) for i, name in enumerate(names)}
    return {"dense": ("black", MARKERS[0])} | drawn


def _by_place(pairs: Iterable[tuple[Any, float]]) -> Points:
    points: Points = {}
    for place, value in pairs:
        points.setdefault(place, []).append(value)
    return points


def block_of(name: str) -> int:
    """The block that a layer's name begins with: model.layers.3.self_attn.q_proj is in block 3."""
    numbers = re.findall(r"\.(\d+)\.|\.(\d+)$", f"{name}")
    return int(next(filter(None, numbers[0]))) if numbers else 0
