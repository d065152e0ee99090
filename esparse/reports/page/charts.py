"""The figures of a page as rows of numbers, each with its run; marks.py says how Vega-Lite draws them.

Page.js leaves out the rows of runs that the filter hides, chooses colors by the theme, and puts in what depends on
both, if a specification has "$low", "$high" (the range of all charts of a picture), "$order" (methods, best first) or
"$scale" (linear, or logarithmic if values are far apart).
Means and deviations over seeds are Vega's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from esparse.reports.figures.bits import family, quantiser
from esparse.reports.figures.curves import block_of, kernel_name, named_runs, timed_rows, work_of
from esparse.reports.figures.plots import beside_metric, places
from esparse.reports.page import marks
from esparse.reports.page.run_facts import shortened
from esparse.reports.reading import Record, at, keys
from esparse.reports.tabulate import bits_per_weight, table_of

Rows = list[dict[str, Any]]
INK = [-1, 0]  # the style of what is not a method: text's color, a circle
PROFILED = 20  # runs at most whose zeros a page holds


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel; each of its rows has the `run` that it is of, a `style` (color, shape) and a `label` of the legend."""

    title: str
    rows: Rows
    spec: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Few:
    """That a picture shows the `n` methods with the best mean of a field; `runs`: the first run with data alone.

    `each`: every chart has methods of its own.
    """

    n: int = 10
    field: str = ""
    best: str = "min"
    runs: bool = False
    each: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """The charts of a picture, what they have in common, and how wide one must be, in rem."""

    charts: list[Chart]
    few: Few | None = None
    range_of: list[str] = field(default_factory=list)  # fields whose values all charts show between $low and $high
    order_by: str = ""
    least: int = 21
    columns: int = 0  # charts that stand in a row if there is room; 0: as many as fit


def perplexities(records: Sequence[Record], corpus: str | None = None) -> Group:
    """A line per method, a marker per pattern, a chart per model and corpus."""
    corpora = [corpus] if corpus is not None else keys(records, "quality")
    charts: dict[tuple[str, str], Rows] = {}
    patterns = list(dict.fromkeys(row["pattern"] for row in table_of(records).rows))
    for run in named_runs(records):
        pattern = run.pattern
        for name in corpora:
            of_run = at(run.record, "quality").get(name) or {}
            if of_run.get("pruned") is None:
                continue
            ppl, dense = shortened(of_run["pruned"], 5), shortened(of_run.get("dense"), 5)
            style = [patterns.index(pattern)] * 2
            row = {"run": run.id, "method": run.method, "label": pattern, "style": style, "ppl": ppl, "dense": dense}
            charts.setdefault((run.model, name), []).append(row)
    return Group(
        [Chart(f"{model} on {name}", rows, marks.listed()) for (model, name), rows in charts.items()],
        Few(60, "ppl"),
        order_by="ppl",
        least=30,
    )


def bits(records: Sequence[Record], corpus: str | None = None) -> Group:
    """Perplexity against bits per weight: a line per pattern and method, a chart per model and corpus."""
    if not any(at(record, "memory.bits") for record in records):
        return Group([])
    corpora = [corpus] if corpus is not None else keys(records, "quality")
    runs = [(family(run.pattern, run.method, run.record), run) for run in named_runs(records)]
    names = list(dict.fromkeys(name for name, _ in runs))
    charts: dict[str, Rows] = {}
    for name, run in runs:
        x, style = bits_per_weight(run.record), [names.index(name)] * 2
        for of in corpora:
            ppl = (at(run.record, f"quality.{of}") or {}).get("pruned")
            if x is None or ppl is None or not math.isfinite(ppl):
                continue
            row = {"run": run.id, "method": name, "label": name, "style": style, "quantiser": quantiser(run.record)}
            charts.setdefault(f"{run.model} on {of}", []).append(row | {"x": shortened(x), "y": shortened(ppl, 5)})
    return Group([Chart(title, rows, marks.by_bits()) for title, rows in charts.items()], least=30)


def errors(records: Sequence[Record], corpus: str | None = None) -> Group:
    """A line per method, a chart per model and pattern."""
    return _along_depth(records, "relative_error", "mean relative error", Few(10, "value"))


def kept(records: Sequence[Record], corpus: str | None = None) -> Group:
    """A chart per model, pattern and metric, each with a range of its own: scores of two metrics are not alike."""
    return _along_depth(records, "kept_score", "mean kept score", Few(10, "value", "max", each=True), by_metric=True)


def _along_depth(records: Sequence[Record], what: str, title: str, few: Few, *, by_metric: bool = False) -> Group:
    charts: dict[str, Rows] = {}
    runs = named_runs(records)
    style = places([run.method for run in runs])
    if by_metric:  # which then needs no color
        style = {method: (rest, rest) for method, (_, rest) in style.items()}
    for run in runs:
        name = ", ".join([run.model, run.pattern, *([run.scored] if by_metric else [])])
        of_block: dict[int, list[float]] = {}
        for layer in run.record.get("layers") or []:
            if (value := layer.get(what)) is not None and math.isfinite(value):
                of_block.setdefault(block_of(layer.get("name") or ""), []).append(value)
        for block, values in sorted(of_block.items()):
            label = beside_metric(run.method) if by_metric else run.method
            row = {"run": run.id, "method": run.method, "label": label, "style": style[run.method]}
            charts.setdefault(name, []).append(row | {"block": block, "value": shortened(_mean(values))})
    spec = marks.along_depth(title, shared=not by_metric)
    return Group([Chart(name, rows, spec) for name, rows in charts.items()], few, [] if by_metric else ["value"])


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def tasks(records: Sequence[Record], corpus: str | None = None) -> Group:
    """A line per task and method, a chart per model and pattern."""
    charts: dict[str, Rows] = {}
    runs = [run for run in named_runs(records) if run.record.get("zeroshot")]
    style = places([run.method for run in runs])
    for run in runs:
        for task, value in run.record["zeroshot"].items():
            row = {"run": run.id, "method": run.method, "label": run.method, "style": style[run.method], "task": task}
            numbers = {name: shortened(value.get(name)) for name in ("dense", "pruned", "stderr")}
            charts.setdefault(f"{run.model}, {run.pattern}", []).append(row | numbers)
    return Group([Chart(name, rows, marks.scores()) for name, rows in charts.items()], Few(10, "pruned", "max"))


def profile(records: Sequence[Record], corpus: str | None = None) -> Group:
    """Shares of zeros along depth, a chart for weights, activations and attention each, of one run at a time."""
    charts: dict[str, Rows] = {}
    for record in [record for record in records if record.get("profile")][:PROFILED]:
        thresholds = record["profile"]["thresholds"][::2]
        series = [(which, t) for which in ("dense", "pruned") for t in thresholds]
        for which, threshold in series:
            of_block: dict[tuple[str, int], list[float]] = {}
            for row in record["profile"]["rows"]:
                of_block.setdefault((row["kind"], block_of(row["name"])), []).append(row[f"{which} {threshold:g}"])
            name = f"{which}, x = 0" if threshold == 0 else f"{which}, |x| ≤ {threshold:g}"
            style = [int(which == "pruned")] * 2
            for (kind, block), shares in sorted(of_block.items()):
                one = {"run": record["id"], "method": name, "label": name, "style": style, "zero": threshold == 0}
                one |= {"block": block, "value": shortened(_mean(shares))}
                charts.setdefault(kind, []).append(
                    one | {"least": shortened(min(shares)), "most": shortened(max(shares))}
                )
    kinds = [kind for kind in ("weight", "activation", "attention") if kind in charts]
    return Group([Chart(kind, charts[kind], marks.shares()) for kind in kinds], Few(runs=True))


def latency(records: Sequence[Record], corpus: str | None = None) -> Group:
    """Milliseconds against tokens, a chart per shape and dtype."""
    return _timed(records, marks.times(), lambda row, ms: (row["tokens"], ms), by_shape=True)


def roofline(records: Sequence[Record], corpus: str | None = None) -> Group:
    """Work per second against work per byte, a chart per dtype, below what the device did at most."""

    def point(row: dict[str, Any], ms: float) -> tuple[float, float]:
        work, moved = work_of(row)
        return work / moved, work / ms / 1e9

    charts = []
    for chart in _timed(records, {}, point, by_shape=False).charts:
        dtype, x = chart.title, sorted(row["x"] for row in chart.rows)
        roofs: Rows = []
        for record in records:
            limits = record.get("limits") or {}
            most, rate = (limits.get("flop_per_s") or {}).get(dtype), limits.get("copy_bytes_per_s")
            if not most or not rate:
                continue
            device = at(record, "environment.device") or "the device"
            knee = [most / rate] if x[0] < most / rate < x[-1] else []
            for place in (x[0], *knee, x[-1]):
                roof = {"run": record["id"], "label": "", "style": INK, "roof": f"limit of {device}", "x": place}
                roofs.append(roof | {"y": min(most, rate * place) / 1e12})
        charts.append(Chart(dtype, chart.rows + roofs, marks.work(roofs=bool(roofs))))
    return Group(charts)


def _timed(
    records: Sequence[Record],
    spec: dict[str, Any],
    point: Callable[[dict[str, Any], float], tuple[float, float]],
    *,
    by_shape: bool,
) -> Group:
    every = timed_rows(records)
    kernels = list(dict.fromkeys(kernel_name(row, every) for row in every))
    charts: dict[str, Rows] = {}
    for record in records:
        for row in timed_rows([record]):
            shape, dtype = f"{row['n']} × {row['k']}", str(row.get("dtype") or "")
            title = ", ".join(filter(None, (shape, dtype))) if by_shape else dtype
            kernel = kernel_name(row, every)
            index = kernels.index(kernel)
            for name, ms, style in (("dense", row["dense_ms"], INK), (kernel, row["sparse_ms"], [index, index + 1])):
                x, y = point(row, ms)
                one = {"run": record["id"], "method": name, "label": name, "style": style, "layer": row.get("layer")}
                one |= {"tokens": row["tokens"], "x": shortened(x), "y": shortened(y)}
                charts.setdefault(title, []).append(one)
    return Group([Chart(title, rows, spec) for title, rows in charts.items()])
