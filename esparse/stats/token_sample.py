"""A sample of the tokens that a layer reads.

Shapes: T tokens of one micro-batch, I input channels, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esparse.parallel.ranks import Ranks
from esparse.stats.statistic import Statistic


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
        self._x_SI = torch.zeros(0, self.inputs, device=self.device, dtype=torch.float32)

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
        on_device = [index.to(self.device, non_blocking=True) for index in (place_T, near_T[come_T])]
        self._x_SI.index_copy_(0, on_device[0], x_TI.index_select(0, on_device[1]))

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
