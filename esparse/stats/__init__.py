"""Streaming statistics of one layer's input: metrics name the statistics they need, the block loop feeds them.

Shapes: T tokens of one micro-batch, I input channels, K histogram bins, S sampled tokens.
A statistic does not depend on how the tokens are cut into micro-batches, apart from rounding: sums of a channel are
kept in float64 (float32 within a tile), the Gram matrix in float32, counts as integers, and a statistic that needs the
value range first passes over the tokens twice. If several ranks each see a share of the tokens, `unite` combines their
statistics: counts and extremes equal those of one process exactly, sums up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esparse import kernels
from esparse.linalg import inverse_factor, multiplies_into_float32
from esparse.parallel.cores import each_core
from esparse.parallel.ranks import Ranks

# Tokens reduced at a time: a tile stays in a CPU's cache, a whole micro-batch does not.
TILE = 256
# Channels whose histograms one CPU core fills at a time: the bins of more would not stay in its cache.
CHANNELS = 192


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


# Builds a statistic from (inputs, sequences, device); `collects` methods return dictionaries of factories.
Factory = Callable[..., Statistic]


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
            for tile_TI in x_TI.split(TILE):
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
        self.max_I = torch.zeros(self.inputs, device=self.device)

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if pass_index == 0 and len(x_TI):
            self.tokens += x_TI.shape[0]
            for tile_TI in x_TI.split(TILE):
                torch.maximum(self.max_I, tile_TI.abs().amax(dim=0).float(), out=self.max_I)

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        ranks.max_(self.max_I)


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
        bound = torch.full((self.inputs,), float("inf") if self.passes == 2 else -limit, device=self.device)
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
            for tile_TI in x_TI.split(TILE):
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
            bins_TC = torch.empty(size, device=self.device)
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


class Gram(Statistic):
    """The Gram matrix G = X^T X in float32 (I x I; 0.5 GB for 11008 channels), SparseGPT's and GPTQ's "Hessian".

    On a GPU the matrix units multiply half-precision inputs directly: their products are exact in float32.
    """

    PANELS = 8  # panels of columns; entries below the diagonal panels (7/16) are not computed, as G is symmetric
    WIDE = 2048  # least channels of a panel on a GPU: with fewer, part of the GPU is idle

    def __init__(self, **size: Any) -> None:
        super().__init__(**size)
        self._sum_II = torch.zeros(self.inputs, self.inputs, device=self.device)
        step = max(self.WIDE if self.device.type == "cuda" else 1, -(-self.inputs // self.PANELS))
        self._panels = [slice(first, min(first + step, self.inputs)) for first in range(0, self.inputs, step)]
        self._is_whole = True
        self._factors: dict[tuple[Any, ...], Tensor] = {}

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if pass_index == 0:
            self.tokens += x_TI.shape[0]
            is_half = multiplies_into_float32(x_TI)
            x_TI = x_TI if is_half else x_TI.float()
            for panel in self._panels:
                sum_PI, left_TP, right_TI = self._sum_II[panel, panel.start :], x_TI[:, panel], x_TI[:, panel.start :]
                if is_half:
                    sum_PI += torch.mm(left_TP.T, right_TI, out_dtype=torch.float32)
                else:
                    sum_PI.addmm_(left_TP.T, right_TI)
            self._is_whole = False

    @property
    def gram_II(self) -> Tensor:
        if not self._is_whole:
            for panel in self._panels:
                self._sum_II[panel.stop :, panel] = self._sum_II[panel, panel.stop :].T
            self._is_whole = True
        return self._sum_II

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        ranks.sum_(self.gram_II)

    def inverse_factor(self, order_I: Tensor | None, damp: float) -> Tensor:
        """`linalg.inverse_factor` of G with its channels in this order; layers of one input group share it."""
        key = (damp, None if order_I is None else tuple(order_I.tolist()))
        if key not in self._factors:
            gram_II = self.gram_II if order_I is None else self.gram_II[order_I][:, order_I]
            self._factors = {key: inverse_factor(gram_II, damp)}  # caches one only, because it is as large as G
        return self._factors[key]


class TokenSample(Statistic):
    """The inputs of up to `most` tokens, spread evenly over all tokens: the tokens with the lowest turns.

    The turn of the i-th token is (i + 1) / golden ratio modulo 1 (Fibonacci hashing). The distances between sampled
    tokens then take at most three values, and no period: a stride of 2^k would meet the first token of every sequence,
    whose activations are like no other's. Experts count i on their own rank, so that on several ranks the sample
    differs from that of one process, but is drawn in the same way.
    """

    def __init__(self, *, most: int, **size: Any) -> None:
        super().__init__(**size)
        self.most = most
        # Token numbers (on the host, so that a GPU need not be waited for) and their inputs, in any order.
        self._token_S = torch.zeros(0, dtype=torch.int64)
        self._x_SI = torch.zeros(0, self.inputs, device=self.device)

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if pass_index == 0:
            first = self.before + self.tokens
            self.tokens += x_TI.shape[0]
            self._take(torch.arange(first, first + x_TI.shape[0]), x_TI)

    def _take(self, token_T: Tensor, x_TI: Tensor) -> None:
        """Replaces sampled tokens by new ones with lower turns."""
        held, near_T = len(self._token_S), torch.arange(len(token_T))
        if held == self.most:  # drops new tokens with later turns than all sampled ones
            near_T = (_turn(token_T) < _turn(self._token_S).max()).nonzero()[:, 0]
            token_T = token_T[near_T]
        turn_N = _turn(torch.cat([self._token_S, token_T]))
        is_early = turn_N <= turn_N.kthvalue(self.most).values if len(turn_N) > self.most else turn_N >= 0
        come_T = is_early[held:].nonzero()[:, 0]
        if not len(come_T):
            return
        place_T = (~is_early[:held]).nonzero()[:, 0]
        if len(place_T) < len(come_T):  # the sample is not full yet
            size = min(self.most, len(turn_N))
            if size > len(self._x_SI):  # allocates all rows at once, unless there are few: experts may see few tokens
                room_SI = torch.empty(self.most if held else size, self.inputs, dtype=x_TI.dtype, device=self.device)
                room_SI[:held] = self._x_SI[:held]
                self._x_SI = room_SI
            place_T = torch.cat([place_T, torch.arange(held, size)])
            self._token_S = torch.cat([self._token_S, token_T.new_zeros(size - held)])
        self._token_S[place_T] = token_T[come_T]
        there = [index.to(self.device, non_blocking=True) for index in (place_T, near_T[come_T])]
        self._x_SI.index_copy_(0, there[0], x_TI.index_select(0, there[1]))

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        token_S, x_SI = torch.cat(ranks.gather(self._token_S)), ranks.joined(self._held())
        self._token_S, self._x_SI = self._token_S[:0], x_SI[:0]
        self._take(token_S, x_SI)

    def _held(self) -> Tensor:
        return self._x_SI[: len(self._token_S)]

    def x_SI(self) -> Tensor:
        """The sampled inputs in float32, in the order of the tokens."""
        return self._held()[self._token_S.argsort().to(self.device, non_blocking=True)].float()


def _turn(token_T: Tensor) -> Tensor:
    """(i + 1) / golden ratio modulo 1, in units of 2^-32; distinct for 2^32 tokens."""
    return (token_T + 1) * 2654435769 % 2**32


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
