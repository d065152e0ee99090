"""The base class of statistics, and what a metric gets of them.

Shapes: T tokens of one micro-batch, I input channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esparse.parallel.ranks import Ranks

# Tokens reduced at a time: a tile stays in a CPU's cache, a whole micro-batch does not.
TILE = 256


class Statistic(ABC):
    """A quantity that is accumulated over all tokens a layer reads.

    `passes`: passes over the tokens that the statistic needs; 2 if the first only finds the value range.
    """

    passes = 1

    def __init__(self, *, inputs: int, sequences: int, device: torch.device, before: int = 0) -> None:
        """`sequences`: number on all ranks; `before`: number of tokens on earlier ranks, before any routing."""
        self.inputs = inputs
        self.sequences = sequences
        self.device = device
        self.before = before
        self.tokens = 0

    @abstractmethod
    def add(self, x_TI: Tensor, pass_index: int) -> None:
        """Adds the inputs of some tokens, in the first (`pass_index` 0) or second pass."""

    def add_all(self, parts: Sequence[Tensor], pass_index: int) -> None:
        """Adds the inputs of several micro-batches."""
        for x_TI in parts:
            self.add(x_TI, pass_index)

    def unite(self, ranks: Ranks, pass_index: int, tokens: Sequence[int]) -> None:
        """Combines the ranks' statistics, on every rank; all ranks must call it after each pass.

        `tokens`: number of tokens that each rank's statistic has by then.
        """
        if pass_index == self.passes - 1:
            self._unite(ranks, tokens)
            self.tokens = sum(tokens)

    @abstractmethod
    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        """Combines after the last pass; `tokens`: number on each rank."""


def tiles(x_TI: Tensor) -> Sequence[Tensor]:
    """The tokens in pieces that stay in a CPU's cache."""
    return x_TI.split(TILE)


# Builds a statistic from (inputs, sequences, device); `collects` methods return dictionaries of factories.
Factory = Callable[..., Statistic]


class WeightGradient:
    """Gradients of one layer's weights on the calibration sequences, for metrics that ask for them by `gradients()`."""

    def __init__(self, mean_square_OI: Tensor) -> None:
        self.mean_square_OI = mean_square_OI  # mean over sequences


class LayerStats(Mapping[str, Any]):
    """What a metric may use: the statistics that it asked for, by name, the layer's name and its number of tokens."""

    def __init__(self, name: str, statistics: Mapping[str, Any], tokens: int) -> None:
        self.name = name
        self.tokens = tokens
        self._statistics = statistics

    def __getitem__(self, key: str) -> Any:
        return self._statistics[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)
