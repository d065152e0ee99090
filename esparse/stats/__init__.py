"""Streaming statistics of one layer's input: a metric names what it needs, the block loop feeds it.

Shapes: T tokens of one micro-batch, I input channels, K histogram bins, S sampled tokens.
Every statistic gives the same value however the tokens are cut into micro-batches, but for rounding: sums of a channel
are kept in float64 (in float32 over the rows of one tile), the Gram matrix in float32, counts in integers, and what
needs the whole range first asks for a second look at the same tokens. Where several ranks each see a share of the
tokens, `unite` makes of their statistics that of all tokens: what is counted or compared is the same as in one process,
sums but for their rounding.
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

# Tokens whose columns are reduced at a time: a tile stays in the cache of a CPU, a whole micro-batch does not.
TILE = 256
# Channels whose histograms one core of a CPU fills at a time: the bins of more would not stay in its cache.
CHANNELS = 192


class Statistic(ABC):
    """Something that is summed up over all tokens a layer reads.

    `looks` says how often the tokens have to pass: 2 where the first pass only finds out the range of the values.
    """

    passes = 1

    def __init__(self, *, inputs: int, sequences: int, device: torch.device, before: int = 0) -> None:
        """`sequences`: of all ranks; `before`: how many tokens the ranks before this one have, before any routing."""
        self.inputs = inputs
        self.sequences = sequences
        self.device = device
        self.before = before
        self.tokens = 0

    @abstractmethod
    def add(self, x_TI: Tensor, pass_index: int) -> None:
        """Takes the inputs of some tokens, for the first (`look` 0) or second time."""

    def add_all(self, parts: Sequence[Tensor], pass_index: int) -> None:
        """Takes the inputs of several micro-batches."""
        for x_TI in parts:
            self.add(x_TI, pass_index)

    def unite(self, ranks: Ranks, pass_index: int, tokens: Sequence[int]) -> None:
        """Makes it the statistic of all ranks' tokens, on every rank; to be called on all of them after each look.

        `tokens`: those that the statistics of the ranks have by then.
        """
        if pass_index == self.passes - 1:
            self._unite(ranks, tokens)
            self.tokens = sum(tokens)

    @abstractmethod
    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        """After the last look; `tokens` of each rank."""


# Builds a statistic from (inputs, sequences, device); a metric returns a dictionary of them.
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
        """The norms (float32, I values) by one of three conventions.

        sequence: root of the mean over sequences of the per-sequence sum of squares (Wanda's code, arXiv 2306.11695);
        rms: root of the mean over tokens; total: root of the sum over all tokens (the formula as it is printed).
        A ranking by |w| * norm cannot tell them apart; E-Sparse adds an entropy to the norm and can.
        """
        count = {"sequence": self.sequences, "rms": max(self.tokens, 1), "total": 1}[convention]
        return (self.sum_sq_I / count).sqrt().float()


class ColumnMoments(Statistic):
    """Mean and variance of each input channel over the calibration tokens.

    Sums are those of the distance from the first token: a channel that never changes has a variance of exactly 0, and
    one far from 0 keeps its digits.
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
        # About 4 M values at a time: in float64 they would otherwise be up to four times the input.
        for part_TI in x_TI.split(max(1, 2**22 // self.inputs)):
            distance_TI = part_TI.double() - self.first_I
            self.sum_I += distance_TI.sum(0)
            self.sum_sq_I += distance_TI.square_().sum(0)

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        # Each rank has the distances from its own first token: they become those from the first token of all.
        first_I = ranks.joined(self.first_I[None] if self.tokens else self.first_I.new_zeros(0, self.inputs))[:1].sum(0)
        moved_I = self.first_I - first_I if self.tokens else torch.zeros_like(first_I)
        self.sum_sq_I += (2 * self.sum_I + self.tokens * moved_I) * moved_I
        self.sum_I += self.tokens * moved_I
        self.first_I = first_I
        ranks.sum_(self.sum_I)
        ranks.sum_(self.sum_sq_I)

    def mean_I(self) -> Tensor:
        """The means (float32, I values), 0 where no token came."""
        return (self.first_I + self.sum_I / max(self.tokens, 1)).float()

    def variance_I(self) -> Tensor:
        """The mean squared distances from the mean (float32, I values), 0 where no token came."""
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

    `range` fixes where the bins lie. channel: from the channel's least to its greatest value; layer: from the least to
    the greatest value of all channels of the input. Both are exact and look at the tokens twice. fixed: from -limit to
    +limit, one look; what lies outside counts into the outermost bins.
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
        if pass_index == 1:  # together, so that the cores have more to do before they wait for each other
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
        # Of a range near the ends of float32 the width or its reciprocal overflows: powers of two move it, exactly.
        lift_I = torch.where((width_I > 0) & (width_I < 2.0**-100), 2.0**100, 1.0)
        lift_I = torch.where(high_I / 2 - low_I / 2 > 2.0**126, 2.0**-10, lift_I)
        if bool((lift_I != 1).any()):
            parts, low_I, high_I = [x_TI * lift_I for x_TI in parts], low_I * lift_I, high_I * lift_I
            width_I = high_I - low_I
        # A channel that never changes has one bin and no entropy.
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
        # Some million values at a time: the indices beside it would otherwise be as large as the input.
        step = max(1, (2**20 if on_cpu else 2**21) // min(self.inputs, CHANNELS if on_cpu else self.inputs))

        def count(channels: slice) -> None:
            if compiled is not None:
                arrays = [value_I.numpy() for value_I in (low_I.contiguous(), scale_I, self.counts_IK)]
                for x_TI in parts:
                    compiled.count(x_TI.numpy(), channels.start, channels.stop, *arrays)
                return
            low, scale, counts_CK = low_I[channels], scale_I[channels], self.counts_IK[channels]
            # Indices of 32 bits are counted faster than those of 64.
            place_C = torch.arange(0, counts_CK.numel(), self.bins, dtype=torch.int32, device=self.device)
            size = (min(step, max(map(len, parts))), len(place_C))
            # Made once: in a thread, memory that is let go of is taken from it at once.
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
        """IR_c = -sum_k p_k log p_k (float32, I values), 0 where no token came."""
        share_IK = self.counts_IK.double() / max(self.tokens, 1)
        return torch.special.entr(share_IK).sum(-1).float()


def _is_plain(x_TI: Tensor) -> bool:
    """Whether a compiled loop can read it as it lies."""
    return x_TI.dtype == torch.float32 and x_TI.is_contiguous()


class Gram(Statistic):
    """G = X^T X of the input in float32: I x I values, so 0.5 GB for 11008 channels.

    On a GPU the matrix units multiply inputs in half precision as they are: their products are exact in float32.
    """

    PANELS = 8  # what lies below the panels on the diagonal is not computed: 7/16 of all products
    WIDE = 2048  # channels of a panel on a GPU, at least: fewer would leave a part of it idle

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
        """`linalg.inverse_factor` of the Gram matrix with its channels in that order; layers of a group share it."""
        key = (damp, None if order_I is None else tuple(order_I.tolist()))
        if key not in self._factors:
            gram_II = self.gram_II if order_I is None else self.gram_II[order_I][:, order_I]
            self._factors = {key: inverse_factor(gram_II, damp)}  # one at a time: each is as large as G
        return self._factors[key]


class TokenSample(Statistic):
    """The inputs of up to `most` tokens, spread evenly over all of them: those of the lowest turns.

    The turn of the i-th token is (i + 1) / golden ratio modulo 1 (Fibonacci hashing). So the distances in between take
    three values at most, and none that sequences of some length would repeat: a stride of 2^k would in every sequence
    meet the first token, whose activations are like no other's. Of an expert of several ranks, the i-th token is
    counted on its rank, so that the sample is not that of one process, but drawn alike.
    """

    def __init__(self, *, most: int, **size: Any) -> None:
        super().__init__(**size)
        self.most = most
        # Tokens by number, on the host so that a GPU is not waited for, and their inputs; both in any order.
        self._token_S = torch.zeros(0, dtype=torch.int64)
        self._x_SI = torch.zeros(0, self.inputs, device=self.device)

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        if pass_index == 0:
            first = self.before + self.tokens
            self.tokens += x_TI.shape[0]
            self._take(torch.arange(first, first + x_TI.shape[0]), x_TI)

    def _take(self, token_T: Tensor, x_TI: Tensor) -> None:
        """Puts the inputs of early tokens into the places of later ones."""
        held, near_T = len(self._token_S), torch.arange(len(token_T))
        if held == self.most:  # so that a later turn than all of them comes too late
            near_T = (_turn(token_T) < _turn(self._token_S).max()).nonzero()[:, 0]
            token_T = token_T[near_T]
        turn_N = _turn(torch.cat([self._token_S, token_T]))
        is_early = turn_N <= turn_N.kthvalue(self.most).values if len(turn_N) > self.most else turn_N >= 0
        come_T = is_early[held:].nonzero()[:, 0]
        if not len(come_T):
            return
        place_T = (~is_early[:held]).nonzero()[:, 0]
        if len(place_T) < len(come_T):  # not full yet
            size = min(self.most, len(turn_N))
            if size > len(self._x_SI):  # room for all there will be, unless they are few: experts may see few tokens
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
    """(i + 1) / golden ratio modulo 1, in units of 2^-32: no two of 2^32 tokens have the same one."""
    return (token_T + 1) * 2654435769 % 2**32


class WeightGradient:
    """The gradients of one layer's weights on the calibration sequences; a metric asks for them by `gradients()`."""

    def __init__(self, mean_square_OI: Tensor) -> None:
        self.mean_square_OI = mean_square_OI  # over sequences


class LayerStats(Mapping[str, Any]):
    """What a metric may look at: the statistics it asked for by their names, the layer's name and its token count."""

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
