"""Norm, mean, variance and maximum of each input channel.

Shapes: T tokens of one micro-batch, I input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esparse import kernels
from esparse.parallel.ranks import Ranks
from esparse.stats.statistic import Statistic, tiles


class ColumnNorm(Statistic):
    """The l2 norm of each input channel over the calibration tokens."""

    def __init__(self, **size: Any) -> None:
        super().__init__(**size)
        self.sum_sq_I = torch.zeros(self.inputs, dtype=torch.float64, device=self.device)

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if pass_index == 0:
            self.tokens += x_TI.shape[0]
            tally = kernels.triton("tally", x_TI.device)
            if tally is not None:
                self.sum_sq_I += tally.squares(x_TI).sum(0, dtype=torch.float64)
                return
            for tile_TI in tiles(x_TI):
                self.sum_sq_I += tile_TI.float().square().sum(0)

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        ranks.sum_(self.sum_sq_I)

    def norm_I(self, convention: str) -> Tensor:
        """The norms (float32, I values) in one of three conventions.

        sequence: root of the mean over sequences of the per-sequence sum of squares (Wanda's code, arXiv 2306.11695);
        rms: root of the mean over tokens; total: root of the sum over all tokens (the formula as printed). They rank
        |w| * norm alike, but E-Sparse adds an entropy to the norm, so there the convention matters.
        """
        count = {"sequence": self.sequences, "rms": max(self.tokens, 1), "total": 1}[convention]
        return (self.sum_sq_I / count).sqrt().float()


class ColumnMoments(Statistic):
    """Mean and variance of each input channel over the calibration tokens.

    It sums distances from the first token, so that a constant channel has a variance of exactly 0 and a channel far
    from 0 loses no digits.
    """

    def __init__(self, **size: Any) -> None:
        super().__init__(**size)
        self.first_I, self.sum_I, self.sum_sq_I = (
            torch.zeros(self.inputs, dtype=torch.float64, device=self.device) for _ in range(3)
        )

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if pass_index != 0 or x_TI.shape[0] == 0:
            return
        if self.tokens == 0:
            self.first_I = x_TI[0].double()
        self.tokens += x_TI.shape[0]
        # About 4 M values at a time, because the float64 copies take up to four times the input's memory.
        for part_TI in x_TI.split(max(1, 2**22 // self.inputs)):
            distance_TI = part_TI.double() - self.first_I
            self.sum_I += distance_TI.sum(0)
            self.sum_sq_I += distance_TI.square_().sum(0)

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        # Each rank has distances from its own first token; converts them to distances from the very first token.
        first_I = ranks.joined(self.first_I[None] if self.tokens else self.first_I.new_zeros(0, self.inputs))[:1].sum(0)
        moved_I = self.first_I - first_I if self.tokens else torch.zeros_like(first_I)
        self.sum_sq_I += (2 * self.sum_I + self.tokens * moved_I) * moved_I
        self.sum_I += self.tokens * moved_I
        self.first_I = first_I
        ranks.sum_(self.sum_I)
        ranks.sum_(self.sum_sq_I)

    def mean_I(self) -> Tensor:
        """The means (float32, I values); 0 without tokens."""
        return (self.first_I + self.sum_I / max(self.tokens, 1)).float()

    def variance_I(self) -> Tensor:
        """The population variances (float32, I values); 0 without tokens."""
        count = max(self.tokens, 1)
        return (self.sum_sq_I / count - (self.sum_I / count).square()).clamp_(min=0).float()


class ColumnMax(Statistic):
    """The greatest absolute value of each input channel over the calibration tokens."""

    def __init__(self, **size: Any) -> None:
        super().__init__(**size)
        self.max_I = torch.zeros(self.inputs, device=self.device, dtype=torch.float32)

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if pass_index == 0 and len(x_TI):
            self.tokens += x_TI.shape[0]
            for tile_TI in tiles(x_TI):
                torch.maximum(self.max_I, tile_TI.abs().amax(dim=0).float(), out=self.max_I)

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        ranks.max_(self.max_I)
