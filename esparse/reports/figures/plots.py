"""Perplexities of many runs as a picture, and how all pictures call and colour a method."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from esparse.records.groups import acting
from esparse.reports.reading import Record, keys
from esparse.reports.table import Table, text
from esparse.reports.tabulate import FRONT, means, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's, then some of Tol's that are told apart from them.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#332288", "#117733", "#882255")
MARKERS = "osD^vPX*<>ph"
SIDE_BY_SIDE = 10  # methods beside each other in one pattern; more have a line each
LINES = 60  # methods at most that have one
LINE_INCHES = 0.19  # of a legend


def perplexities(records: Sequence[Record], corpus: str | None = None) -> Figure | None:
    """Perplexity by pattern: a marker per method (mean and deviation over seeds), dense as a line.

    A color per metric, a shape per shuffle and the rest, a panel per model and corpus; what is not finite
    is named below its panel. Many methods have a line each, and the patterns colors and shapes. None where no run was
    measured.
    """
    from matplotlib.figure import Figure

    if not keys(records, "quality"):
        return None
    table = means(table_of(records, corpus=corpus))
    name_of = namer(table)
    for row in table.rows:
        row["method"] = name_of(row)
    corpora = [corpus] if corpus is not None else keys(records, "quality")
    models = list(dict.fromkeys(row["model"] for row in table.rows))
    methods = list(dict.fromkeys(row["method"] for row in table.rows))
    if len(methods) > SIDE_BY_SIDE:
        return _listed(table, corpora, models)
    patterns = {m: list(dict.fromkeys(row["pattern"] for row in table.rows if row["model"] == m)) for m in models}
    widest = max(max(3.2, 0.8 + len(p) * (0.35 + 0.3 * len(methods))) for p in patterns.values())
    figure = Figure(figsize=(widest * len(corpora) + 2.2, 3.4 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(corpora), squeeze=False)
    for i, model in enumerate(models):
        for j, name in enumerate(corpora):
            rows = [row for row in table.rows if row["model"] == model]
            _panel(axes[i][j], rows, name, methods=methods, patterns=patterns[model])
            axes[i][j].set_title(f"{model} on {name}", fontsize=10)
    legend(figure, [*methods, "dense"])
    return figure


def measured(records: Sequence[Record]) -> list[Record]:
    """The runs with a perplexity of the pruned model."""
    return [r for r in records if any(value.get("pruned") is not None for value in r["quality"].values())]


def legend(figure: Figure, order: Sequence[str]) -> None:
    """What the lines and markers of all panels are, in this order: on the right, or below where that is too short."""
    handles = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = [label for label in order if label in handles]
    width, height = figure.get_size_inches()
    where: dict[str, Any] = {"loc": "outside right upper"}
    if len(labels) > (height - 0.2) / LINE_INCHES:
        columns = max(1, int(width / (0.6 + 0.075 * max(map(len, labels)))))
        figure.set_size_inches(width, height + LINE_INCHES * -(-len(labels) // columns))
        where = {"loc": "outside lower center", "ncols": columns}
    figure.legend([handles[label] for label in labels], labels, frameon=False, fontsize=9, **where)


def _listed(table: Table, corpora: Sequence[str], models: Sequence[str]) -> Figure:
    """A line per method, a marker per pattern; a panel per model and corpus."""
    from matplotlib.figure import Figure

    panels = [(model, corpus) for model in models for corpus in corpora]
    patterns = list(dict.fromkeys(row["pattern"] for row in table.rows))
    lines = [_lines(table, model, corpus) for model, corpus in panels]
    tallest = max(min(LINES, len(of_panel)) for of_panel in lines)
    figure = Figure(figsize=(7.5 * len(panels) + 1.2, 1.1 + 0.21 * tallest), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (model, corpus), of_panel in zip(axes, panels, lines, strict=True):
        left_out = len(of_panel) - LINES
        names = list(of_panel)[:LINES]
        for place, name in enumerate(names):
            for row in of_panel[name]:
                value, k = row[f"{corpus} ppl pruned"], patterns.index(row["pattern"])
                ax.errorbar(
                    value.mean, place, xerr=value.deviation, color=COLORS[k % len(COLORS)], markersize=5, capsize=2,
                    marker=MARKERS[k % len(MARKERS)], linestyle="none", label=row["pattern"], zorder=3,
                )  # fmt: skip
        floor = [s.mean for of in of_panel.values() for r in of if (s := r[f"{corpus} ppl dense"]) is not None]
        if floor:
            ax.axvline(sum(floor) / len(floor), color="black", linestyle="--", linewidth=1, label="dense", zorder=1)
        drawn = [row[f"{corpus} ppl pruned"].mean for name in names for row in of_panel[name]]
        if drawn and max(drawn) > 5 * min([*drawn, *floor]) > 0:
            _logarithmic(ax.xaxis, ax.set_xscale)
        note = f", the {LINES} lowest of {len(of_panel)} methods" if left_out > 0 else ""
        ax.set_title(f"{model} on {corpus}{note}", fontsize=10)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlabel("perplexity (lower is better)" + _not_finite(_lost(table, model, corpus)), fontsize=9)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    legend(figure, [*patterns, "dense"])
    return figure


def _lines(table: Table, model: str, corpus: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each method that were measured and are finite, the lowest perplexity first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.rows:
        value = row[f"{corpus} ppl pruned"]
        if row["model"] == model and value is not None and math.isfinite(value.mean):
            found.setdefault(row["method"], []).append(row)
    lowest = {name: min(row[f"{corpus} ppl pruned"].mean for row in rows) for name, rows in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: lowest[name])}


def _lost(table: Table, model: str, corpus: str) -> list[str]:
    """The measured values that are NaN or Inf."""
    rows = [row for row in table.rows if row["model"] == model and row[f"{corpus} ppl pruned"] is not None]
    return [f"{r['method']} {r['pattern']}" for r in rows if not math.isfinite(r[f"{corpus} ppl pruned"].mean)]


def _not_finite(lost: Sequence[str]) -> str:
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    return f"\nnot finite: {', '.join(lost[:5])}{more}" if lost else ""


def _logarithmic(axis: Axis, set_scale: Callable[[str], Any]) -> None:
    """With 10, 20, 50 as its numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def namer(table: Table) -> Callable[[dict[str, Any]], str]:
    """How a legend calls a row of the table: its choices that do something, and the settings that differ."""
    known = {"model", "pattern", "runs", "method", *FRONT, *table.shared()}
    varied = [c for c in table.columns if c in table.asked and c not in known]

    def name(row: dict[str, Any]) -> str:
        settings = [f"{c.rpartition('.')[2]}={text(c, row[c])}" for c in varied if row.get(c) is not None]
        return ", ".join([" + ".join(acting(row, FRONT)), *settings])

    return name


def _metric(method: str) -> str:
    return re.split(r" \+ |, ", method)[0]


def _rest(method: str) -> str:
    return method[len(_metric(method)) :]


def beside_metric(method: str) -> str:
    """A method's name in a legend if its metric is known."""
    return _rest(method).strip(" +,") or "metric alone"


def places(methods: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The number of each method's color and of its marker: a color per metric, a shape per shuffle and the rest."""
    metrics = list(dict.fromkeys(map(_metric, methods)))
    rests = sorted(dict.fromkeys(map(_rest, methods)))
    return {m: (metrics.index(_metric(m)), rests.index(_rest(m))) for m in methods}


def styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of each method."""
    return {m: (COLORS[c % len(COLORS)], MARKERS[s % len(MARKERS)]) for m, (c, s) in places(methods).items()}


def _panel(ax: Axes, rows: list[dict[str, Any]], corpus: str, *, methods: list[str], patterns: list[str]) -> None:
    style = styles(methods)
    dense = [s.mean for row in rows if (s := row[f"{corpus} ppl dense"]) and math.isfinite(s.mean)]
    floor = sum(dense) / len(dense) if dense else None
    drawn, lost = list(dense), []
    step = 0.8 / len(methods)
    for row in rows:
        spread, k = row[f"{corpus} ppl pruned"], methods.index(row["method"])
        if spread is None:
            continue  # this run was not measured on it
        if not math.isfinite(spread.mean):
            lost.append(f"{row['method']} {row['pattern']}")
            continue
        x = patterns.index(row["pattern"]) + (k - (len(methods) - 1) / 2) * step
        color, marker = style[row["method"]]
        if floor is not None:
            ax.plot([x, x], [floor, spread.mean], color=color, linewidth=1.2, alpha=0.5, zorder=2)
        ax.errorbar(
            x, spread.mean, yerr=spread.deviation, color=color, marker=marker, markersize=6, capsize=3,
            linestyle="none", label=row["method"], zorder=3,
        )  # fmt: skip
        number = text(" ppl ", spread.mean) if spread.mean < 100 else f"{spread.mean:,.0f}"
        top = spread.mean + (spread.deviation or 0.0)
        ax.annotate(number, (x, top), (0, 6), textcoords="offset points", ha="center", fontsize=7, color="#333333")
        drawn.append(top)
    if floor is not None:
        ax.axhline(floor, color="black", linestyle="--", linewidth=1, label="dense", zorder=1)
    if drawn and max(drawn) > 5 * min(drawn) > 0:
        _logarithmic(ax.yaxis, ax.set_yscale)
        ax.set_ylim(min(drawn) / 1.2, max(drawn) * 1.35)
    elif drawn:
        room = (max(drawn) - min(drawn)) or max(drawn) * 0.1
        ax.set_ylim(min(drawn) - 0.08 * room, max(drawn) + 0.16 * room)
    ax.set_xlim(-0.5, len(patterns) - 0.5)
    ax.set_xticks(range(len(patterns)), patterns)
    ax.set_xlabel(f"pattern{_not_finite(lost)}", fontsize=9)
    ax.set_ylabel("perplexity (lower is better)", fontsize=9)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
