"""Bytes that packing would save, from model configurations alone: `python -m esparse.packed.memory [NAME_OR_DIR ...]`.

Without arguments it shows LLaMA-7B to 65B. It builds the models on the meta device and counts the bytes of all their
tensors, in memory and on disk; embeddings, norms and head stay dense.

E-Sparse (arXiv 2310.15929) publishes other savings. One gets them to the last digit by counting four d x d and only two
d x f matrices per block (LLaMA has three) and one embedding (LLaMA has two, counting the head), with one bit per weight
for the index: `counted as published`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from esparse import patterns
from esparse.errors import Mistake
from esparse.parts import numbers
from esparse.quantise.grids import Grid
from esparse.records.groups import GROUPS

PATTERNS = ("2:4", "4:8", "8:16", "8:16+16:256")
LLAMA = [f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b", "65b")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esparse.packed.memory", description=__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        help="hub names, directories, or options of model= such as llama-7b (default: LLaMA-7B to 65B)",
    )
    parser.add_argument("--patterns", default=",".join(PATTERNS), help="n:m, or n:m+k:256 with outliers")
    parser.add_argument(
        "--quantise", default="", help="none, int8, int4, int3, fp8, nf4, ...: of kept values, with conf/'s groups"
    )
    asked = parser.parse_args(arguments)
    try:
        grids = {name: _grid(name) for name in asked.quantise.split(",") if name}
        for text in asked.patterns.split(","):
            coded = str(patterns.from_str(text)) == "dense" and any(grid is not None for grid in grids.values())
            if not patterns.from_str(text).parts() and not coded:
                raise Mistake(f"{text} is no n:m pattern, and only n:m can be packed, or dense with --quantise")
        if "" in map(str.strip, asked.models):
            raise Mistake("a model is a hub name, a directory or an option of model=, got ''")
        from esparse.packed import savings  # torch is loaded from here on

        models = {name: savings.config_of(path) for name, path in _named(asked.models or LLAMA).items()}
        rows = savings.table(models, asked.patterns.split(","), grids)
    except (ValueError, OSError) as error:
        print(f"esparse: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 2
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print("|---" * len(row) + "|")
    print("\nIn 16-bit precision; GB are 10^9 bytes. Saved: of the whole model, embeddings, norms and head dense.")
    return 0


def _named(models: Sequence[str]) -> dict[str, str]:
    """The models by the last parts of their names, those of config.json by their folders'; whole if two end alike."""
    folders = [name.removesuffix("/config.json").rstrip("/") for name in dict.fromkeys(models)]
    last = [name.rpartition("/")[2] for name in folders]
    pairs = zip(last, dict.fromkeys(models), strict=True)
    return {short if last.count(short) == 1 else name: name for short, name in pairs}


def _grid(name: str) -> Grid | None:
    """The grid of conf/quantise/NAME.yaml; None for 16 bits. Raises Mistake for an unknown name."""
    part, _ = numbers.option("quantise", name, lambda group, own: GROUPS[group].component(own), outside=numbers.usual())
    return part if isinstance(part, Grid) else None


if __name__ == "__main__":
    sys.exit(main())
