"""Which pictures there are of a folder of records, what they say, and how they get into a file or a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.reports.figures import channels, curves
from esparse.reports.figures.bits import perplexity_by_bits, with_bits
from esparse.reports.figures.plots import measured, perplexities
from esparse.reports.reading import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of many runs; `draw` returns None where their records have nothing for it, `of` those that have."""

    title: str
    caption: str
    needs: str  # which runs it is of, behind "it needs runs"
    draw: Callable[[Sequence[Record]], Figure | None]
    of: Callable[[Sequence[Record]], Sequence[Record]]


PICTURES = {
    "perplexity": Picture(
        "Perplexity by pattern",
        "A marker per method: mean over seeds, with the standard deviation. Dashed: the dense model. Many methods have "
        "a line each.",
        "with a corpus (evaluate)",
        perplexities,
        measured,
    ),
    "bits": Picture(
        "Perplexity against bits per weight",
        "A line per pattern and method, a point per quantiser: mean over seeds, with the standard deviation. Bits are "
        "all that a pruned weight takes on disk: values, index, scales, zero points, outliers, padding; a value "
        "that is not rounded counts 16. Dashed: the Pareto front; no run has fewer bits and a lower perplexity.",
        "with quantise and a corpus (evaluate)",
        perplexity_by_bits,
        with_bits,
    ),
    "errors": Picture(
        "Layer errors along depth",
        "‖X(W − W′)ᵀ‖ / ‖XWᵀ‖ of each layer on calibration tokens, as a mean over the layers of a block.",
        "with calibration tokens",
        curves.errors,
        curves.with_layers("relative_error"),
    ),
    "kept": Picture(
        "Kept score along depth",
        "The share of a layer's total score that its surviving weights have, as a mean over the layers of a block. "
        "Each metric has a panel, as it has a score of its own.",
        "with layers",
        curves.kept,
        curves.with_layers("kept_score"),
    ),
    "channels": Picture(
        "Channels before and after the shuffle",
        "Of the input of one layer: every channel at its place, and the mean of every group that competes. Left: in "
        "the channels' own order. Then: as each shuffle cuts the groups, of runs that differ by nothing else.",
        "with profile=true",
        channels.channels,
        channels.shown,
    ),
    "evenness": Picture(
        "What the shuffle evens out",
        "Standard deviation of the means of a layer's groups, in per cent of their mean, as a mean over the inputs of "
        "a block. Dashed: in the channels' own order.",
        "with profile=true and an n:m pattern",
        channels.evenness,
        channels.alike,
    ),
    "tasks": Picture(
        "Zero-shot tasks",
        "Markers: the pruned model, with its standard error. Dashed: the dense model.",
        "with tasks (zeroshot=builtin, ...)",
        curves.tasks,
        curves.with_tasks,
    ),
    "profile": Picture(
        "Zeros and near zeros",
        "Mean and range over the layers, or attention heads, of a block. Weights and activations are measured against "
        "the root mean square of a layer's values, attention against 1. Of the first run that has a profile.",
        "with profile=true",
        curves.profile,
        curves.first_profile,
    ),
    "latency": Picture(
        "Latency against tokens",
        "Of single layers (outputs × inputs), as measured; both axes are logarithmic.",
        "with bench=gemm",
        curves.latency,
        curves.timed,
    ),
    "roofline": Picture(
        "Speed against intensity",
        "Work of the dense product per second against work per byte. Lines: what the device did at most in the same "
        "runs, by bytes (a copy) and by operations (a large dense product). A sparse kernel reads and computes less "
        "than the dense product that it is counted as, and may stand above them.",
        "with bench=gemm",
        curves.roofline,
        curves.timed,
    ),
}


def draw(name: str, records: Sequence[Record], *, corpus: str | None = None, layer: str | None = None) -> Figure | None:
    """One of PICTURES; `corpus` matters to perplexities alone, `layer` to channels."""
    if name == "channels":
        return channels.channels(records, layer)
    if name == "bits":
        return perplexity_by_bits(records, corpus)
    return perplexities(records, corpus) if name == "perplexity" else PICTURES[name].draw(records)


def plot(
    records: Sequence[Record],
    path: Path,
    *,
    name: str = "perplexity",
    corpus: str | None = None,
    layer: str | None = None,
) -> int:
    """Writes one picture, and returns how many of the runs have the data that it shows.

    Raises ValueError for another type than .png, .svg or .pdf, or where no run has the data.
    """
    if path.suffix.lower() not in FORMATS:
        raise Mistake(f"a plot is written as {', '.join(FORMATS)}, not as {path.name!r}")
    figure = draw(name, records, corpus=corpus, layer=layer)
    if figure is None:
        raise Mistake(f"no run has what a plot of {name} shows: it needs runs {PICTURES[name].needs}")
    figure.savefig(path, dpi=200, bbox_inches="tight")  # legends stand outside, titles may be wider than the axes
    of_corpus = [record for record in records if corpus is None or corpus in record["quality"]]
    return len(PICTURES[name].of(of_corpus))
