"""Sparsity patterns: which weights may survive together. The only file that knows groups of m.

Shapes: O outputs, I inputs, G groups, M = m weights of one group.
Polarity: a boolean mask is always called `keep`; True means the weight survives. In `n:m`, n weights survive.
Ties: of equal scores the one with the lowest index survives.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXPLAINED = (
    "pattern must look like '2:4' (of every 4 consecutive weights of a row 2 survive) "
    "or '50%' (unstructured: half of every row is removed)"
)


class Pattern(ABC):
    """A rule that says how many weights of which sets survive."""

    @abstractmethod
    def keep_top(self, scores_OI: Tensor) -> Tensor:
        """The highest scores that the pattern lets survive: a boolean keep mask of the same shape."""

    @abstractmethod
    def holds(self, keep_OI: Tensor) -> bool:
        """Whether no set keeps more weights than the pattern allows."""

    @abstractmethod
    def grouped_inputs(self, inputs: int) -> int:
        """How many of a row's leading inputs stand in whole groups, so that a shuffle can move them between groups."""

    @abstractmethod
    def cuts(self, inputs: int) -> list[slice]:
        """The inputs of each group of a row, in order, a shorter last one included."""


@dataclass(frozen=True, slots=True)
class NM(Pattern):
    """Of every `m` consecutive inputs of a row, `n` weights survive.

    A width that `m` does not divide ends in one shorter group of r weights, of which ceil(r * n / m) survive: the
    tail never loses more than its share. Hardware kernels refuse such widths; quality can still be measured.
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        import torch

        whole = self.grouped_inputs(scores_OI.shape[-1])
        keep_OI = torch.empty_like(scores_OI, dtype=torch.bool)
        keep_OI[..., :whole] = _top(scores_OI[..., :whole].unflatten(-1, (-1, self.m)), self.n).flatten(-2)
        tail = scores_OI[..., whole:]
        keep_OI[..., whole:] = _top(tail, self._tail_survivors(tail.shape[-1]))
        return keep_OI

    def holds(self, keep_OI: Tensor) -> bool:
        whole = self.grouped_inputs(keep_OI.shape[-1])
        groups = keep_OI[..., :whole].unflatten(-1, (-1, self.m)).sum(-1) <= self.n
        tail = keep_OI[..., whole:]
        return bool(groups.all() and (tail.sum(-1) <= self._tail_survivors(tail.shape[-1])).all())

    def grouped_inputs(self, inputs: int) -> int:
        return inputs - inputs % self.m

    def cuts(self, inputs: int) -> list[slice]:
        return [slice(start, min(start + self.m, inputs)) for start in range(0, inputs, self.m)]

    def _tail_survivors(self, tail: int) -> int:
        return -(-tail * self.n // self.m)


@dataclass(frozen=True, slots=True)
class Unstructured(Pattern):
    """Of every row, `removed_percent` per cent of the weights go (rounded down), wherever they stand."""

    removed_percent: float

    def __str__(self) -> str:
        return f"{self.removed_percent:g}%"

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        return _top(scores_OI, self._survivors(scores_OI.shape[-1]))

    def holds(self, keep_OI: Tensor) -> bool:
        return bool((keep_OI.sum(-1) <= self._survivors(keep_OI.shape[-1])).all())

    def grouped_inputs(self, inputs: int) -> int:
        return 0

    def cuts(self, inputs: int) -> list[slice]:
        return [slice(0, inputs)]

    def _survivors(self, inputs: int) -> int:
        return inputs - int(inputs * self.removed_percent / 100 + 1e-9)


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """A pattern whose groups are cut in an order of the channels; masks and scores stay in the channels' own order.

    `order_I[k]` is the channel that stands at place k; None is the channels' own order.
    """

    pattern: Pattern
    order_I: Tensor | None = None

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        """The keep mask of these scores."""
        return self.restored(self.pattern.keep_top(self.ordered(scores_OI)))

    def holds(self, keep_OI: Tensor) -> bool:
        """Whether no group keeps more weights than the pattern allows."""
        return self.pattern.holds(self.ordered(keep_OI))

    def ordered(self, x_OI: Tensor) -> Tensor:
        """The columns as they stand when the groups are cut."""
        return x_OI if self.order_I is None else x_OI[:, self.order_I]

    def restored(self, x_OI: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        import torch

        return x_OI if self.order_I is None else torch.empty_like(x_OI).index_copy_(1, self.order_I, x_OI)


def parse(text: object) -> Pattern:
    """The pattern that a text such as '2:4' or '50%' names; ValueError with what was expected otherwise."""
    if not isinstance(text, str) or re.fullmatch(r"\d+", text):
        raise ValueError(f"{EXPLAINED}, got {text!r}: in YAML write it in quotes, unquoted 2:4 is the number 124")
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = map(int, match.groups())
        if not 0 < n < m:
            raise ValueError(f"pattern n:m needs 0 < n < m, since n of m weights survive; got {text!r}")
        return NM(n, m)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        removed = float(match.group(1))
        if not 0 < removed < 100:
            raise ValueError(f"an unstructured pattern removes between 0% and 100% of each row, got {text!r}")
        return Unstructured(removed)
    raise ValueError(f"{EXPLAINED}, got {text!r}")


def _top(scores_M: Tensor, n: int) -> Tensor:
    """Keeps the `n` highest of the last dimension, the lowest index first among equals."""
    import torch

    m = scores_M.shape[-1]
    if m > 16:
        order = scores_M.argsort(dim=-1, descending=True, stable=True)[..., :n]
        return torch.zeros_like(scores_M, dtype=torch.bool).scatter_(-1, order, True)
    # All pairs are compared: for the usual small groups 2 to 5 times faster than sorting.
    columns = scores_M.movedim(-1, 0).contiguous()
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=columns.device)
    for left in range(m):
        for right in range(left + 1, m):
            left_wins = columns[left] >= columns[right]  # `>=`: the lower index wins a tie
            rank[right] += left_wins
            rank[left] += ~left_wins
    return (rank < n).movedim(0, -1)
