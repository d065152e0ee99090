"""Which rungs of the ladder are real: perplexity ratios between methods, compared window by window.

    python launch.py -cd experiments -cn ladder
    python experiments/significance.py outputs/ladder
    python experiments/significance.py outputs/real --corpus wikitext2 --against wanda    # all, with one of them

For each pattern and each pair of methods: the ratio of their perplexities (the same windows, averaged over calibration
seeds), its 95 % interval by a bootstrap over runs of 8 neighbouring windows (neighbours share a document), and in how
many seeds the ratio is below 1. "yes" stands where the interval lies below 1 and every seed agrees, "worse" where it
lies above 1 and every seed agrees; what is neither is not shown by these data.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from esparse.reports.reading import Record, read_records

PAIRS = [
    ("wanda", "magnitude"),
    ("esparse_paper", "wanda"),
    ("esparse_paper + gns", "esparse_paper"),
    ("esparse_paper + esparse", "esparse_paper + gns"),
    ("esparse_paper + esparse", "esparse_paper"),
    ("esparse_paper + esparse", "magnitude"),
    ("wanda + esparse", "wanda"),
    ("esparse_paper + esparse", "wanda + esparse"),
]
NEIGHBOURS = 8
DRAWS = 10_000

Losses = dict[tuple[str, str], dict[int, np.ndarray]]  # by pattern and method, then by seed: one loss per window


def read_losses(root: Path, corpus: str) -> Losses:
    """The pruned models' losses (nats, one per window) of every finished run below `root`."""
    losses: Losses = defaultdict(dict)
    for record in read_records(root):
        windows = load_file(root / record["id"] / "window_losses.safetensors")[f"pruned/{corpus}"]
        losses[record["sparsity"]["pattern"], method(record)][record["config"]["seed"]] = windows
    return losses


def method(record: Record) -> str:
    """Metric, shuffle, update and recovery as a name, without those that do nothing."""
    choices = record["config"]["choices"]
    parts = [choices[group] for group in ("metric", "shuffle", "update", "recovery")]
    return " + ".join([parts[0], *(part for part in parts[1:] if part != "none")])


def compare(first: dict[int, np.ndarray], second: dict[int, np.ndarray]) -> tuple[float, float, float, int, int]:
    """Perplexity ratio first / second, its interval, seeds in which it is below 1, seeds in common."""
    seeds = sorted(first.keys() & second.keys())
    by_seed = np.stack([first[seed] - second[seed] for seed in seeds])
    difference = by_seed.mean(axis=0)
    runs = np.array_split(difference, max(1, len(difference) // NEIGHBOURS))
    sums, counts = np.array([run.sum() for run in runs]), np.array([len(run) for run in runs])
    drawn = np.random.default_rng(0).integers(len(runs), size=(DRAWS, len(runs)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    below = int((by_seed.mean(axis=1) < 0).sum())
    return float(np.exp(difference.mean())), float(np.exp(low)), float(np.exp(high)), below, len(seeds)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--corpus", default="builtin")
    arguments.add_argument("--against", help="compares every other method with this one; otherwise the ladder's pairs")
    asked = arguments.parse_args()
    losses = read_losses(asked.folder, asked.corpus)
    methods = dict.fromkeys(name for _, name in losses)
    pairs = [(name, asked.against) for name in methods if name != asked.against] if asked.against else PAIRS
    print("| pattern | method | against | perplexity ratio | 95 % interval | seeds below 1 | lower |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for pattern in dict.fromkeys(pattern for pattern, _ in losses):
        for better, worse in pairs:
            if (pattern, better) in losses and (pattern, worse) in losses:
                ratio, low, high, below, seeds = compare(losses[pattern, better], losses[pattern, worse])
                shown = {(True, seeds): "yes", (False, 0): "worse"}.get((high < 1, below), "not shown")
                shown = "not shown" if low <= 1 <= high else shown
                interval = f"{low:.4f} – {high:.4f}"
                print(f"| {pattern} | {better} | {worse} | {ratio:.4f} | {interval} | {below} of {seeds} | {shown} |")


if __name__ == "__main__":
    main()
