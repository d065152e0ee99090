"""Draws overview.svg beside this file, the picture of README.md, from committed results.

    python docs/picture.py

Left: experiments/results/real-smollm2.csv. Right: experiments/results/gpu-NVIDIA-H200-*.json. A test compares what
the picture shows with these files.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import mean

import matplotlib

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("overview.svg")
TABLE = ROOT / "experiments" / "results" / "real-smollm2.csv"
GPU = TABLE.with_name("gpu-NVIDIA-H200-2026-11-28.json")
PREFILL = GPU.with_name("gpu-NVIDIA-H200-2026-11-28-prefill.json")
# What each bar is called, and its metric, shuffle, update and recovery in the table.
BARS = {
    "Wanda": ("wanda", "none", "none", "none"),
    "entropy": ("entropy", "none", "none", "none"),
    "Wanda, shuffle": ("wanda", "esparse", "none", "none"),
    "entropy, shuffle": ("entropy", "esparse", "none", "none"),
    "SparseGPT": ("sparsegpt", "none", "sparsegpt", "none"),
    "ADMM": ("wanda", "none", "admm", "none"),
    "SparseGPT towards dense": ("sparsegpt", "none", "sparsegpt_parent", "none"),
    "ALPS, shuffle": ("entropy", "esparse", "alps", "none"),
    "ALPS towards dense, shuffle": ("entropy", "esparse", "alps_parent", "none"),
    "the same, distilled": ("entropy", "esparse", "alps_parent", "distill"),
}
# Of the settings in which the table's runs differ: of these are the bars.
OURS = {
    "shuffle.foldable": ("",),
    "calibration.sequences": ("32",),
    "update.damp": ("", "0.01"),
    "update.sequential": ("", "True"),
    "update.trust": ("", "0.5"),
    "update.residual": ("", "0.25"),
    "prepare": ("none",),
    "recovery.epochs": ("", "3"),
    "recovery.batch": ("", "1"),
}
CORPUS = "test.txt"  # WikiText-2's test split
KERNELS = {"packed": "esparse's kernel", "cusparselt": "cuSPARSELt"}
GREY, DARK, LIGHT, LINE = "#7a7a7a", "#00796b", "#80cbc4", "#c62828"


def perplexities(pattern: str = "2:4") -> tuple[dict[str, float], float]:
    """The mean over seeds for each bar, and the dense model's."""
    rows = [row for row in csv.DictReader(TABLE.open()) if row["pattern"] == pattern]
    rows = [row for row in rows if all(row.get(key, "") in values for key, values in OURS.items())]
    parts = ("metric", "shuffle", "update", "recovery")
    means = {}
    for name, wanted in BARS.items():
        means[name] = mean(float(row[f"{CORPUS} ppl pruned"]) for row in rows if tuple(map(row.get, parts)) == wanted)
    (dense,) = {float(row[f"{CORPUS} ppl dense"]) for row in rows}
    return means, dense


def speedups(pattern: str = "2:4") -> dict[str, dict[int, float]]:
    """By kernel and number of tokens: dense time over sparse time of all products of a LLaMA-7B block."""
    decode, prefill = (
        [row for row in json.loads(path.read_text())["parts"][part]["rows"] if row.get("pattern") == pattern]
        for path, part in ((GPU, "decode"), (PREFILL, "prefill"))
    )
    few = {row["tokens"] for row in decode}  # of which the later call has the numbers
    rows = [*decode, *(row for row in prefill if row["tokens"] not in few)]
    found: dict[str, dict[int, float]] = {}
    for kernel in KERNELS:
        these = [row for row in rows if row["kernel"] == kernel and row["sparse_ms"]]
        for tokens in sorted({row["tokens"] for row in these}):
            at = [row for row in these if row["tokens"] == tokens]
            dense, sparse = (sum(row[f"{kind}_ms"] * row["matrices"] for row in at) for kind in ("dense", "sparse"))
            found.setdefault(kernel, {})[tokens] = dense / sparse
    return found


def draw() -> None:
    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "esparse"}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.9), width_ratios=(1.15, 1), layout="constrained")
        bars(left)
        lines(right)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(PICTURE, metadata={"Date": None}, facecolor="white")


def bars(axes) -> None:
    values, dense = perplexities()
    colours = [GREY, LIGHT, GREY, LIGHT, GREY, GREY, LIGHT, LIGHT, LIGHT, DARK]
    drawn = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.axvline(dense, color=LINE, linewidth=1.5)
    axes.text(dense, -0.75, f"dense {dense:.1f}", color=LINE, ha="center", va="bottom")
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("perplexity, lower is better")
    axes.set_title("2:4 on SmolLM2-135M, WikiText-2\n", fontsize=11)


def lines(axes) -> None:
    for (kernel, by_tokens), colour in zip(speedups().items(), (DARK, GREY), strict=True):
        axes.plot(list(by_tokens), list(by_tokens.values()), "o-", color=colour, label=KERNELS[kernel])
        for place in (0, -1):
            tokens = list(by_tokens)[place]
            axes.annotate(
                f"{by_tokens[tokens]:.2f}",
                (tokens, by_tokens[tokens]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
            )
    axes.axhline(1, color=LINE, linewidth=1.5)
    axes.text(9000, 1.02, "dense", color=LINE, ha="right", va="bottom")
    axes.set_xscale("log", base=2, nonpositive="mask")
    axes.set_xticks([1, 4, 16, 64, 512, 2048, 8192], ["1", "4", "16", "64", "512", "2048", "8192"])
    axes.minorticks_off()
    axes.set_ylim(0, 1.9)
    axes.set_xlabel("tokens at once")
    axes.set_ylabel("times as fast as dense")
    axes.set_title("2:4 on one H200, a LLaMA-7B block's products\n", fontsize=11)
    axes.legend(frameon=False, loc="lower right")


if __name__ == "__main__":
    draw()
    print(PICTURE)
