"""Perplexities of many runs as a picture, and how all pictures call and colour a method."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esparse.grid import METHOD, Grid, Record, grid, keys, means, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")  # Okabe and Ito
MARKERS = "osD^vPX"


def perplexities(records: Sequence[Record], corpus: str | None = None) -> Figure | None:
    """Perplexity by pattern: a marker per method (mean and deviation over seeds), dense as a line.

    A color per metric, a shape per shuffle and the rest, a panel per model and corpus; what is not finite
    is named below its panel. None where no run was measured.
    """
    from matplotlib.figure import Figure

    if not keys(records, "quality"):
        return None
    table = means(grid(records, corpus=corpus))
    for row in table.rows:
        row["method"] = method(row, table)
    corpora = [corpus] if corpus is not None else keys(records, "quality")
    models = list(dict.fromkeys(row["model"] for row in table.rows))
    methods = list(dict.fromkeys(row["method"] for row in table.rows))
    patterns = {m: list(dict.fromkeys(row["pattern"] for row in table.rows if row["model"] == m)) for m in models}
    widest = max(max(3.2, 0.8 + len(p) * (0.35 + 0.3 * len(methods))) for p in patterns.values())
    figure = Figure(figsize=(widest * len(corpora) + 2.2, 3.4 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(corpora), squeeze=False)
    for i, model in enumerate(models):
        for j, name in enumerate(corpora):
            rows = [row for row in table.rows if row["model"] == model]
            _panel(axes[i][j], rows, name, methods=methods, patterns=patterns[model])
            axes[i][j].set_title(f"{model} on {name}", fontsize=10)
    handles = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    ordered = [label for label in [*methods, "dense"] if label in handles]
    figure.legend([handles[o] for o in ordered], ordered, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def method(row: dict[str, Any], table: Grid) -> str:
    """How a legend calls a row: its choices that do something, and the settings that differ."""
    chosen = [str(row[c]) for c in METHOD if row.get(c) not in (None, "none")]
    known = {"model", "pattern", "runs", "method", *METHOD}
    varied = [c for c in table.columns if c in table.asked and c not in known and c not in table.shared()]
    settings = [f"{c.rpartition('.')[2]}={text(c, row[c])}" for c in varied if row.get(c) is not None]
    return ", ".join([" + ".join(chosen), *settings])


def _metric(method: str) -> str:
    return re.split(r" \+ |, ", method)[0]


def _rest(method: str) -> str:
    return method[len(_metric(method)) :]


def looks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of each method: a color per metric, a shape per shuffle and the rest."""
    metrics = list(dict.fromkeys(map(_metric, methods)))
    rests = sorted(dict.fromkeys(map(_rest, methods)))
    return {
        m: (COLORS[metrics.index(_metric(m)) % len(COLORS)], MARKERS[rests.index(_rest(m)) % len(MARKERS)])
        for m in methods
    }


def _panel(ax: Axes, rows: list[dict[str, Any]], corpus: str, *, methods: list[str], patterns: list[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    look = looks(methods)
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
        color, marker = look[row["method"]]
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
        ax.set_yscale("log")
        ax.set_ylim(min(drawn) / 1.2, max(drawn) * 1.35)
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=12))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif drawn:
        room = (max(drawn) - min(drawn)) or max(drawn) * 0.1
        ax.set_ylim(min(drawn) - 0.08 * room, max(drawn) + 0.16 * room)
    ax.set_xlim(-0.5, len(patterns) - 0.5)
    ax.set_xticks(range(len(patterns)), patterns)
    below = f"\nnot finite: {', '.join(lost)}" if lost else ""
    ax.set_xlabel(f"pattern{below}", fontsize=9)
    ax.set_ylabel("perplexity (lower is better)", fontsize=9)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
