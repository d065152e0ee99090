"""Which pictures there are of a folder of records, what they say, and how they get into a file or a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esparse import curves
from esparse.grid import Record
from esparse.plots import perplexities

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of many runs; `draw` returns None where their records have nothing for it."""

    title: str
    caption: str
    draw: Callable[[Sequence[Record]], Figure | None]


PICTURES = {
    "perplexity": Picture(
        "Perplexity by pattern",
        "A marker per method: mean over seeds, with the standard deviation. The dashed line is the dense model.",
        perplexities,
    ),
    "errors": Picture(
        "Layer errors along depth",
        "‖X(W − W′)ᵀ‖ / ‖XWᵀ‖ of each layer on calibration tokens, as a mean over the layers of a block.",
        curves.errors,
    ),
    "kept": Picture(
        "Kept score along depth",
        "The share of a layer's total score that its surviving weights have, as a mean over the layers of a block.",
        curves.kept,
    ),
    "tasks": Picture(
        "Zero-shot tasks",
        "Markers: the pruned model, with its standard error. Dashed: the dense model.",
        curves.tasks,
    ),
    "profile": Picture(
        "Zeros and near zeros",
        "Mean and range over the layers, or attention heads, of a block. Weights and activations are measured against "
        "the root mean square of a layer's values, attention against 1. Of the first run that has a profile.",
        curves.profile,
    ),
    "latency": Picture(
        "Latency against tokens",
        "Of single layers (outputs × inputs), as measured; both axes are logarithmic.",
        curves.latency,
    ),
    "roofline": Picture(
        "Speed against intensity",
        "Work of the dense product per second and per byte, as measured; no ceiling is drawn, as none was measured.",
        curves.roofline,
    ),
}


def draw(name: str, records: Sequence[Record], *, corpus: str | None = None) -> Figure | None:
    """One of PICTURES; `corpus` matters to perplexities alone."""
    return perplexities(records, corpus) if name == "perplexity" else PICTURES[name].draw(records)


def plot(records: Sequence[Record], path: Path, *, name: str = "perplexity", corpus: str | None = None) -> None:
    """Writes one picture; ValueError for another type than .png, .svg or .pdf, or where no run has the data."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"a plot is written as {', '.join(FORMATS)}, not as {path.name!r}")
    figure = draw(name, records, corpus=corpus)
    if figure is None:
        raise ValueError(f"no run has what a plot of {name} shows")
    figure.savefig(path, dpi=200)


def svg(name: str, figure: Figure) -> str:
    """The picture as an <svg> element for a page; text stays text, and ids are its own."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    element = buffer.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # Ids of groups (figure_1, axes_1) would be there once per picture.
    element = re.sub(r'<g id="[^"]*">', "<g>", element)
    label = f"{PICTURES[name].title}. {PICTURES[name].caption}".replace('"', "&quot;").replace("&quot;", "'")
    return element.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
