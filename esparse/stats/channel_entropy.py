"""The entropy of each input channel, from a histogram.

Shapes: T tokens of one micro-batch, I input channels, K histogram bins, C channels of one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esparse import kernels
from esparse.parallel.cores import each_core
from esparse.parallel.ranks import Ranks
from esparse.stats.statistic import Statistic, tiles

# Channels whose histograms one CPU core fills at a time: the bins of more would not stay in its cache.
CHANNELS = 192


class ColumnEntropy(Statistic):
    """The entropy (nats) of each input channel's values, from a histogram of K equal bins (E-Sparse, arXiv 2310.15929).

    `range` sets the bins' range. channel: the channel's least to greatest value; layer: the least to greatest value of
    all channels. Both are exact and take two passes over the tokens. fixed: -limit to +limit, one pass; values outside
    count into the outermost bins.
    """

    def __init__(self, *, bins: int, range: str, limit: float, **size: Any) -> None:
        super().__init__(**size)
        self.bins = bins
        self.range = range
        self.passes = 1 if range == "fixed" else 2
        bound = torch.full(
            (self.inputs,), float("inf") if self.passes == 2 else -limit, device=self.device, dtype=torch.float32
        )
        self.low_I, self.high_I = bound, -bound
        self.counts_IK = torch.zeros(self.inputs, bins, dtype=torch.int64, device=self.device)

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if x_TI.shape[0] == 0:
            return
        tally = kernels.triton("tally", x_TI.device)
        if pass_index == 0 and self.passes == 2 and tally is not None:
            least_PI, greatest_PI = tally.extremes(x_TI)
            self.low_I = torch.minimum(self.low_I, least_PI.amin(0))
            self.high_I = torch.maximum(self.high_I, greatest_PI.amax(0))
        elif pass_index == 0 and self.passes == 2:
            for tile_TI in tiles(x_TI):
                self.low_I = torch.minimum(self.low_I, tile_TI.amin(dim=0).float())
                self.high_I = torch.maximum(self.high_I, tile_TI.amax(dim=0).float())
        if pass_index == self.passes - 1:
            self._count([x_TI])

    def add_all(self, parts: Sequence[Tensor], pass_index: int) -> None:
        if pass_index == 1:  # together, so that cores wait for each other less often
            self._count(parts)
        else:
            super().add_all(parts, pass_index)

    def unite(self, ranks: Ranks, pass_index: int, tokens: Sequence[int]) -> None:
        if pass_index == 0 and self.passes == 2:
            ranks.min_(self.low_I)
            ranks.max_(self.high_I)
        super().unite(ranks, pass_index, tokens)

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        ranks.sum_(self.counts_IK)

    def _count(self, parts: Sequence[Tensor]) -> None:
        self.tokens += sum(len(x_TI) for x_TI in parts)
        low_I, high_I = self.low_I, self.high_I
        if self.range == "layer":
            low_I, high_I = low_I.min().expand_as(low_I), high_I.max().expand_as(high_I)
        width_I = high_I - low_I
        # For ranges near the limits of float32 the width or its reciprocal overflows; a power of two rescales exactly.
        lift_I = torch.where((width_I > 0) & (width_I < 2.0**-100), 2.0**100, 1.0)
        lift_I = torch.where(high_I / 2 - low_I / 2 > 2.0**126, 2.0**-10, lift_I)
        if bool((lift_I != 1).any()):
            parts, low_I, high_I = [x_TI * lift_I for x_TI in parts], low_I * lift_I, high_I * lift_I
            width_I = high_I - low_I
        # A constant channel has one bin and an entropy of 0.
        scale_I = torch.where(width_I > 0, self.bins / width_I, 0.0)
        tally = kernels.triton("tally", self.device)
        if tally is not None:
            counts_KI = torch.zeros(self.bins, self.inputs, dtype=torch.int32, device=self.device)
            for x_TI in parts:
                tally.count(x_TI, low_I.contiguous(), scale_I, counts_KI)
            self.counts_IK += counts_KI.T
            return
        on_cpu = self.device.type == "cpu"
        compiled = kernels.loops("histogram") if on_cpu and all(map(_is_plain, parts)) else None
        # About a million values at a time, because the bin indices take as much memory as the values.
        step = max(1, (2**20 if on_cpu else 2**21) // min(self.inputs, CHANNELS if on_cpu else self.inputs))

        def count(channels: slice) -> None:
            if compiled is not None:
                arrays = [value_I.numpy() for value_I in (low_I.contiguous(), scale_I, self.counts_IK)]
                for x_TI in parts:
                    compiled.count(x_TI.numpy(), channels.start, channels.stop, *arrays)
                return
            low, scale, counts_CK = low_I[channels], scale_I[channels], self.counts_IK[channels]
            # 32-bit indices are counted faster than 64-bit ones.
            place_C = torch.arange(0, counts_CK.numel(), self.bins, dtype=torch.int32, device=self.device)
            size = (min(step, max(map(len, parts))), len(place_C))
            # Allocated once: memory that a thread frees is unmapped at once and would be mapped again page by page.
            bins_TC = torch.empty(size, device=self.device, dtype=torch.float32)
            places_TC = torch.empty(size, dtype=torch.int32, device=self.device)
            for x_TI in parts:
                for x_TC in x_TI[:, channels].split(step):
                    bin_TC, place_TC = bins_TC[: len(x_TC)], places_TC[: len(x_TC)]
                    torch.sub(x_TC, low, out=bin_TC).mul_(scale).clamp_(0, self.bins - 1)
                    place_TC.copy_(bin_TC).add_(place_C)
                    found = torch.bincount(place_TC.flatten(), minlength=counts_CK.numel())
                    counts_CK += found.view_as(counts_CK)

        if on_cpu:
            with each_core() as pool:
                firsts = range(0, self.inputs, CHANNELS)
                list(pool.map(count, [slice(first, min(first + CHANNELS, self.inputs)) for first in firsts]))
        else:
            count(slice(0, self.inputs))

    def entropy_I(self) -> Tensor:
        """IR_c = -sum_k p_k log p_k (float32, I values); 0 without tokens."""
        share_IK = self.counts_IK.double() / max(self.tokens, 1)
        return torch.special.entr(share_IK).sum(-1).float()


def _is_plain(x_TI: Tensor) -> bool:
    """Whether a compiled loop can read the tensor in place."""
    return x_TI.dtype == torch.float32 and x_TI.is_contiguous()
