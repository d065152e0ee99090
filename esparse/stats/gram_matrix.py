"""The Gram matrix of a layer's input.

Shapes: T tokens of one micro-batch, I input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esparse.linalg import inverse_factor, multiplies_into_float32
from esparse.parallel.ranks import Ranks
from esparse.stats.statistic import Statistic


class Gram(Statistic):
    """The Gram matrix G = X^T X in float32 (I x I; 0.5 GB for 11008 channels), SparseGPT's and GPTQ's "Hessian".

    On a GPU the matrix units multiply half-precision inputs directly: their products are exact in float32.
    """

    PANELS = 8  # panels of columns; entries below the diagonal panels (7/16) are not computed, as G is symmetric
    WIDE = 2048  # least channels of a panel on a GPU: with fewer, part of the GPU is idle

    def __init__(self, **size: Any) -> None:
        super().__init__(**size)
        self._sum_II = torch.zeros(self.inputs, self.inputs, device=self.device, dtype=torch.float32)
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


class CrossGram(Statistic):
    """C = X^T Y in float32, X the input and Y what the same tokens would be if no block before were pruned: I x I.

    `tokens` counts those of which both are known: an expert may be sent others.
    """

    def __init__(self, **size: Any) -> None:
        super().__init__(**size)
        self.cross_II = torch.zeros(self.inputs, self.inputs, device=self.device, dtype=torch.float32)

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        """Nothing: a token's two inputs come together, in `add_pair`."""

    def add_pair(self, x_TI: Tensor, dense_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        self.cross_II.addmm_(x_TI.float().T, dense_TI.float())

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        ranks.sum_(self.cross_II)


class StreamGram(Statistic):
    """E^T X in float32, X the input and E what the residual stream behind the layer lacks: outputs x I.

    E is the stream in the dense model without the stream that is there, the layer itself dense in both.
    """

    def __init__(self, *, outputs: int = 1, **size: Any) -> None:
        super().__init__(**size)
        self.lacks_OI = torch.zeros(outputs, self.inputs, device=self.device, dtype=torch.float32)

    def add(self, x_TI: Tensor, pass_index: int) -> None:
        """Nothing: what the stream lacks is known behind the layer only, for `add_lack`."""

    def add_lack(self, x_TI: Tensor, lack_TO: Tensor) -> None:
        self.tokens += len(x_TI)
        self.lacks_OI.addmm_(lack_TO.float().T, x_TI.float())

    def _unite(self, ranks: Ranks, tokens: Sequence[int]) -> None:
        ranks.sum_(self.lacks_OI)
