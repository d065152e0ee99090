"""Perplexity against bits per weight: what pruning, quantisation and both of them buy at the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esparse.records.groups import acts
from esparse.reports.figures.curves import grid_of
from esparse.reports.figures.plots import COLORS, MARKERS, legend, measured, namer
from esparse.reports.reading import Record, at, keys
from esparse.reports.tabulate import bits_per_weight, means, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONT = "Pareto front"


def perplexity_by_bits(records: Sequence[Record], corpus: str | None = None) -> Figure | None:
    """A line per pattern and method, a point per quantiser (mean and deviation over seeds), and the Pareto front.

    None if no run was quantised and measured.
    """
    if not any(record.get("memory", {}).get("bits") for record in records) or not keys(records, "quality"):
        return None
    table = means(table_of(records, corpus=corpus))
    corpora, name_of = [corpus] if corpus is not None else keys(records, "quality"), namer(table)
    panels = [(model, name) for model in dict.fromkeys(row["model"] for row in table.rows) for name in corpora]
    unsaid = {c: None for c in table.columns if c.startswith("quantise.") or c == "outliers"}  # the point says these
    for row in table.rows:
        row["family"] = ", ".join(filter(None, (row["pattern"], name_of(row | unsaid | {"quantise": "none"}))))
    families = list(dict.fromkeys(row["family"] for row in table.rows))
    figure, axes = grid_of(len(panels), width=5.2)
    for ax, (model, name) in zip(axes, panels, strict=False):
        points = points_of([row for row in table.rows if row["model"] == model], name)
        for k, of in enumerate(families):
            line = sorted(point for point in points if point[2] == of)
            if not line:
                continue
            color, marker = COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)]
            x, y, deviation = [p[0] for p in line], [p[1] for p in line], [p[4] for p in line]
            ax.plot(x, y, color=color, marker=marker, markersize=5, linewidth=1.2, label=of)
            ax.errorbar(x, y, yerr=deviation, color=color, capsize=2, linestyle="none")
            for bits, value, _, label, _ in line:
                ax.annotate(label, (bits, value), (4, 4), textcoords="offset points", fontsize=7, color=color)
        front = pareto(points)
        corners = [(p[0], p[1]) for p in front]
        ax.plot(*zip(*corners, strict=True), color="black", linestyle="--", linewidth=1, zorder=1, label=FRONT)
        ax.set_title(f"{model} on {name}", fontsize=10)
        ax.set_xscale("log", base=2)
        ax.set_xticks([2, 3, 4, 6, 8, 12, 16], ["2", "3", "4", "6", "8", "12", "16"])
        ax.set_xlabel("bits per weight (values, index, scales, outliers)", fontsize=9)
        ax.set_ylabel("perplexity (lower is better)", fontsize=9)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    legend(figure, [*families, FRONT])
    return figure


def with_bits(records: Sequence[Record]) -> list[Record]:
    """The runs with a perplexity whose bits are known."""
    return [record for record in measured(records) if bits_per_weight(record) is not None]


def family(pattern: str, of_method: str, record: Record) -> str:
    """A run's pattern and method without the quantiser and its settings."""
    chosen, *settings = of_method.split(", ")
    unsaid = {"outliers", *(at(record, "config.quantise") or {})}
    parts = " + ".join(part for part in chosen.split(" + ") if part != at(record, "config.choices.quantise"))
    return ", ".join(filter(None, (pattern, parts, *[s for s in settings if s.partition("=")[0] not in unsaid])))


def quantiser(record: Record) -> str:
    """How a run's kept values are stored."""
    return _label(at(record, "config.choices.quantise"), at(record, "config.quantise.bits"))


def _label(option: str | None, bits: int | None) -> str:
    if not acts("quantise", option):
        return "16 bits"
    return str(option) if bits is None else f"int{bits}"


Point = tuple[float, float, str, str, float]  # bits, perplexity, family, quantiser, deviation


def points_of(rows: Sequence[dict[str, Any]], corpus: str) -> list[Point]:
    """The runs of one model that were measured on a corpus and are finite."""
    points = []
    for row in rows:
        value, bits = row[f"{corpus} ppl pruned"], row["bits"]
        if value is None or bits is None or not math.isfinite(value.mean):
            continue
        label = _label(row.get("quantise"), row.get("quantise.bits"))
        points.append((bits.mean, value.mean, row["family"], label, value.deviation or 0.0))
    return points


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other is ahead of with as few bits, from the fewest bits on."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
