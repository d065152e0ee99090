"""Two runs of one method that add up in another order: equal but for rounding, up to the first tie and behind it.

Other processes, threads, addresses and processors add the same float32 numbers in another order. The last digit decides
between two weights of equal worth, and the layers behind such a tie see other inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def rounding(inputs: int, damp: float | None = None) -> float:
    """By how much two runs may differ that add the same float32 numbers in another order, relative to what they add.

    A sum of as many products as a layer has inputs is off by eps times their number at most. A factor of the Gram
    matrix multiplies that by the matrix's condition, which damping bounds: the largest eigenvalue is not above the
    trace, `inputs` times the mean of the diagonal, and the least one not below `damp` times that mean.
    """
    condition = 1 if damp is None else 1 + inputs / damp
    return 2 * inputs * EPS * condition


def same_but_for_ties(
    masks: tuple[dict[str, Tensor], dict[str, Tensor]],
    layers: tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]],
    *,
    damp: float | None = None,
    share: float = 0.99,
) -> bool:
    """Asserts that two runs' masks and layers' records are equal up to rounding; returns whether there was a tie.

    `damp` is the damping of a method that factorises the Gram matrix; `share` of each mask must be equal in any case.
    """
    assert masks[0].keys() == masks[1].keys()
    tied = False
    for layer, other in zip(*layers, strict=True):
        assert _words(layer) == _words(other)
        off = rounding(layer["shape"][1], damp)
        if not tied:  # what is kept in a tie is worth the same
            assert other["kept_score"] == pytest.approx(layer["kept_score"], rel=off), layer
        tied |= _differ(*masks, layer["name"])
        if not tied and layer["relative_error"] is not None:
            # The squares are what is summed up, relative to the output's square.
            error = layer["relative_error"]
            slack = 2 * layer["shape"][1] * EPS + (0.0 if damp is None else 2 * error * off + off**2)
            assert other["relative_error"] ** 2 == pytest.approx(error**2, rel=off, abs=slack), layer
    assert min(float((masks[0][entry] == masks[1][entry]).float().mean()) for entry in masks[0]) >= share
    return tied


def _words(layer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in layer.items() if not isinstance(value, float)}


def _differ(first: dict[str, Tensor], second: dict[str, Tensor], layer: str) -> bool:
    """Whether the masks of a layer do, which may be one of a parameter's experts: NAME[2]."""
    entry, _, expert = layer.removesuffix("]").partition("[")
    entry = entry if entry in first else f"{entry}.weight"
    keeps = [masks[entry][int(expert)] if expert else masks[entry] for masks in (first, second)]
    return not torch.equal(*keeps)
