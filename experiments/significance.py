"""Which differences between methods are real: perplexity ratios, compared window by window.

    python launch.py -cd experiments -cn ladder
    python experiments/significance.py outputs/ladder                                     # the ladder's rungs
    python experiments/significance.py outputs/real --corpus wikitext2 --against wanda    # all methods with one of them

For each pattern and each pair of methods: the ratio of their perplexities (the same calibration samples and windows),
its 95 % interval by a bootstrap over samples and over stretches of at least 2048 neighbouring tokens (neighbours share
a document), and in how many samples the ratio is below 1. "yes" stands if the interval lies below 1 and every sample
agrees, "worse" if it lies above 1 and every sample agrees; what is neither, or one sample, shows nothing.

A method is called by its metric, shuffle, update and recovery, those that do nothing left out, and by settings that
most runs of the folder have otherwise: "entropy + esparse (shuffle.foldable=true)". Methods are compared on one model;
of several models, each has rows of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout's esparse

from esparse.errors import Mistake
from esparse.reports.reading import Record, read_records
from esparse.reports.table import exact
from esparse.reports.tabulate import table_of

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
PARTS = ("metric", "shuffle", "update", "recovery")  # groups whose options are a method's name
STRETCH = 2048  # tokens
DRAWS = 10_000

Losses = dict[int, np.ndarray]  # of one method, by calibration sample: one loss per window


def names(records: Sequence[Record]) -> dict[str, str]:
    """By id, what a run's method is called."""
    table = table_of(records)
    said = {"id", "model", "pattern", "outliers", "seed", *PARTS, *table.shared()}
    settings = [c for c in table.asked if c not in said and not c.endswith(".seed")]
    usual = {(c, option): _usual(c, option, table.rows) for c in settings for option in _options(c, table.rows)}
    found = {}
    for row in table.rows:
        parts = [row[group] for group in PARTS if row.get(group) is not None]
        name = " + ".join([parts[0], *(part for part in parts[1:] if part != "none")])
        unusual = [c for c in settings if exact(row.get(c)) != usual[c, row.get(_group(c))]]
        own = ", ".join(f"{c}={table.text(c, row.get(c)) or 'default'}" for c in unusual)
        found[row["id"]] = f"{name} ({own})" if own else name
    return found


def _group(setting: str) -> str:
    """The group to whose options the setting belongs; none for the choice of an option, and for the model."""
    return setting.partition(".")[0] if "." in setting else ""


def _options(setting: str, rows: Sequence[dict[str, Any]]) -> set[Any]:
    """The options of the setting's group that were chosen."""
    return {row.get(_group(setting)) for row in rows}


def _usual(setting: str, option: Any, rows: Sequence[dict[str, Any]]) -> str | None:
    """The value, as text, that more runs of this option have than any other; None if there is no such one."""
    counts = Counter(exact(row.get(setting)) for row in rows if row.get(_group(setting)) == option).most_common(2)
    return None if len(counts) == 2 and counts[0][1] == counts[1][1] else counts[0][0]


def read_losses(root: Path, corpus: str) -> tuple[dict[tuple[tuple[str, str], str], Losses], int]:
    """The pruned models' losses (nats) of every finished run below `root`; tokens of a window.

    By model and pattern, and by method. Raises ValueError if two runs would be one, if windows differ in length or, of
    one model, in number, if a file of losses cannot be read, and if nothing was measured on the corpus.
    """
    records = [record for record in read_records(root) if corpus in record["quality"]]
    if not records:
        raise Mistake(f"no run below {root} was measured on {corpus!r}: --corpus names another one")
    lengths = {record["quality"][corpus]["sequence_length"] for record in records}
    if len(lengths) > 1:
        raise Mistake(f"windows of {sorted(lengths)} tokens cannot be compared")
    found: dict[tuple[tuple[str, str], str], Losses] = defaultdict(dict)
    windows: dict[str, int] = {}
    called = names(records)
    for record in records:
        model, run = record["model"]["name"], record["id"]
        of_method = found[(model, record["sparsity"]["pattern"]), called[run]]
        seed = record["config"]["seed"]
        if seed in of_method:
            raise Mistake(f"two runs of {called[run]} with seed {seed}: {run} is one of them")
        of_method[seed] = _losses(record["folder"] / "window_losses.safetensors", corpus)
        if (number := len(of_method[seed])) != windows.setdefault(model, number):
            raise Mistake(
                f"the runs of {model} were measured on {windows[model]} windows and, {run}, on {number}: compare runs "
                "of the same evaluate.max_tokens"
            )
    return found, lengths.pop()


def _losses(file: Path, corpus: str) -> np.ndarray:
    try:
        return load_file(file)[f"pruned/{corpus}"]
    except (OSError, SafetensorError, KeyError) as error:
        raise Mistake(
            f"{file} is missing or damaged ({type(error).__name__}): move its run out of the folder, or repeat it"
        ) from None


def compare(first: Losses, second: Losses, neighbours: int) -> tuple[float, float, float, int, int]:
    """Perplexity ratio first / second, its interval, samples in which it is below 1, samples in common.

    `neighbours`: how many windows stay together when windows are drawn.
    """
    seeds = sorted(first.keys() & second.keys())
    by_seed_SW = np.stack([first[seed] - second[seed] for seed in seeds])
    runs = np.array_split(np.arange(by_seed_SW.shape[1]), max(1, by_seed_SW.shape[1] // neighbours))
    sums_SR = np.stack([by_seed_SW[:, run].sum(axis=1) for run in runs], axis=1)
    counts_R = np.array([len(run) for run in runs])
    random = np.random.default_rng(0)
    drawn_DS = random.integers(len(seeds), size=(DRAWS, len(seeds)))
    drawn_DR = random.integers(len(runs), size=(DRAWS, len(runs)))
    sums_DSR = sums_SR[drawn_DS[:, :, None], drawn_DR[:, None, :]]
    means_D = sums_DSR.sum(axis=(1, 2)) / (counts_R[drawn_DR].sum(axis=1) * len(seeds))
    low, high = np.quantile(means_D, [0.025, 0.975])
    below = int((by_seed_SW.mean(axis=1) < 0).sum())
    return float(np.exp(by_seed_SW.mean())), float(np.exp(low)), float(np.exp(high)), below, len(seeds)


def verdict(low: float, high: float, below: int, seeds: int) -> str:
    """What an interval and the samples say together; of one sample nothing, as another may say the contrary."""
    if seeds < 2:
        return "one sample"
    if high < 1 and below == seeds:
        return "yes"
    return "worse" if low > 1 and below == 0 else "not shown"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--corpus", default="builtin")
    arguments.add_argument("--against", help="compares every other method with this one; otherwise the ladder's pairs")
    asked = arguments.parse_args()
    try:
        losses, length = read_losses(asked.folder, asked.corpus)
    except Mistake as mistake:
        print(f"significance: {mistake}", file=sys.stderr)
        return 2
    methods = dict.fromkeys(name for _, name in losses)
    if asked.against and asked.against not in methods:
        print(f"significance: no method {asked.against!r}; there is {', '.join(methods)}", file=sys.stderr)
        return 2
    pairs = [(name, asked.against) for name in methods if name != asked.against] if asked.against else PAIRS
    lines = []
    models = {model for (model, _), _ in losses}
    for model, pattern in dict.fromkeys(where for where, _ in losses):
        for name, against in pairs:
            first, second = losses.get(((model, pattern), name), {}), losses.get(((model, pattern), against), {})
            if first.keys() & second.keys():
                ratio, low, high, below, seeds = compare(first, second, max(1, STRETCH // length))
                mean = np.mean([np.exp(of_windows.mean()) for of_windows in first.values()])
                where = pattern if len(models) == 1 else f"{model} {pattern}"
                cells = [where, name, f"{mean:.2f}", against, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"]
                lines.append([*cells, f"{below} of {seeds}", verdict(low, high, below, seeds)])
    if not lines:
        what = f"method beside {asked.against!r}" if asked.against else "pair of the ladder (--against names a method)"
        said = f"no {what} on the same model, pattern and seed; there is {', '.join(methods)}"
        print(f"significance: {asked.folder} has {said}", file=sys.stderr)
        return 1
    print("| pattern | method | perplexity | against | ratio | 95 % interval | samples below 1 | lower |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for line in lines:
        print("| " + " | ".join(line) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
