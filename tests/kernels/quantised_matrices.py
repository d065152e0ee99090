"""Quantised matrices to try loops and kernels on."""

from __future__ import annotations

from typing import Any

import torch

from esparse import option
from esparse.packed import quantised
from esparse.packed.quantised import QuantisedMatrix
from esparse.patterns import parse

PATTERNS = [("2:4", None), ("8:16", None), ("3:7", None), ("dense", None), ("2:4", "1:16"), ("8:16", "16:256")]
GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int4", {}),
    ("int3", {}),
    ("fp8", {}),
    ("nf4", {}),
    ("int8", {"symmetric": False}),
    ("int4", {"symmetric": False, "scale": "float32"}),
    ("int3", {"symmetric": False, "scale": "bfloat16"}),
    ("int4", {"bits": 6}),
    ("nf4", {"outlier_bits": None}),
    ("int4", {"outlier_bits": None, "symmetric": False}),
]
# whole words in a group, words that reach over groups, pieces of a row, a piece of a word
WIDTHS = [(64, 32), (100, 20), (2048 + 64, 64), (37, None)]


def quantised_matrix(
    asked: tuple[str, str | None], quantise: str, changes: dict[str, Any], inputs: int, group: int | None
) -> tuple[QuantisedMatrix, torch.Tensor]:
    """A matrix as it comes from a file, and its values."""
    pattern, grid = parse(*asked), option("quantise", quantise, group=group, **changes)
    weight_OI = torch.randn(7, inputs, generator=torch.Generator().manual_seed(inputs))
    keep_OI = pattern.keep_top(weight_OI.abs())
    rounded_OI, scales = grid.nearest(weight_OI, keep_OI, pattern)
    tensors = quantised.to_file(rounded_OI + 0.0, pattern, grid, scales)
    return quantised.from_file(tensors, pattern, inputs, grid), rounded_OI + 0.0
