"""Which charts a page has of the catalogue's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from esparse.reports.figures.catalogue import PICTURES
from esparse.reports.page import charts, shuffle_charts
from esparse.reports.page.charts import Group
from esparse.reports.reading import Record

DRAWN: dict[str, Callable[[Sequence[Record], str | None], Group]] = {
    "perplexity": charts.perplexities,
    "bits": charts.bits,
    "errors": charts.errors,
    "kept": charts.kept,
    "channels": shuffle_charts.channels,
    "evenness": shuffle_charts.evenness,
    "tasks": charts.tasks,
    "profile": charts.profile,
    "latency": charts.latency,
    "roofline": charts.roofline,
}
# Where a figure of the page is not what the caption of the picture says.
CAPTIONS = {
    "perplexity": "A line per method, a marker per pattern: mean over seeds, with the standard deviation. Dashed: the "
    "dense model.",
    "bits": "A line per pattern and method, a point per quantiser: mean over seeds. Dashed: the Pareto front; no run "
    "has fewer bits and a lower perplexity. Bits are all that a pruned weight takes on disk: values, index, scales, "
    "zero points, outliers, padding; a value that is not rounded counts 16.",
    "channels": "Of the input of one layer: every channel at its place, and the mean of every group that competes. "
    "First in the channels' own order, then as each shuffle cuts the groups, of runs that differ by nothing else.",
    "evenness": "Standard deviation of the means of a layer's groups, in per cent of their mean, as a mean over the "
    "inputs of a block, in the channels' own order and as each shuffle cuts the groups.",
    "tasks": "Markers: the pruned model, with its standard error. The line through a task's methods: the dense model.",
    "profile": "Mean and range over the layers, or attention heads, of a block. Weights and activations are measured "
    "against the root mean square of a layer's values, attention against 1. Of the first run shown that has a profile.",
}


def drawn(records: Sequence[Record], corpus: str | None = None) -> dict[str, Group]:
    """Every picture that the records have something for, in the catalogue's order."""
    groups = {name: DRAWN[name](records, corpus) for name in PICTURES}
    return {name: group for name, group in groups.items() if any(chart.rows for chart in group.charts)}


def as_data(groups: dict[str, Group]) -> list[dict[str, Any]]:
    """The pictures as page.js reads them."""
    return [asdict(group) | {"name": name} for name, group in groups.items()]


def caption(name: str) -> str:
    """What stands above the charts of a picture."""
    return CAPTIONS.get(name, PICTURES[name].caption)
