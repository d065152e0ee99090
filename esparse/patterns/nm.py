"""What every pattern can do, and the pattern of groups, n:m.

Shapes: O outputs, I inputs, G groups, M = m weights of one group, that compete with each other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Pattern(ABC):
    """A rule that says how many weights of which sets survive; by default a row is cut into no groups."""

    @abstractmethod
    def keep_top(self, scores_OI: Tensor) -> Tensor:
        """The highest scores that the pattern lets survive: a boolean keep mask of the same shape."""

    @abstractmethod
    def holds(self, keep_OI: Tensor) -> bool:
        """Whether no set keeps more weights than the pattern allows."""

    @abstractmethod
    def metadata_bits(self, outputs: int, inputs: int) -> int:
        """Bits that say which weights of one matrix survive, every group in the fewest bits that tell its choices.

        Without groups a flag per weight, or per column, row or block. What a kernel's format takes may be more.
        """

    def cuts(self, inputs: int) -> list[slice]:
        """The inputs of each set that `keep_top` can choose by itself, in order, a shorter last one included."""
        return [slice(0, inputs)]

    def sweep_cuts(self, inputs: int, block: int) -> list[slice]:
        """The inputs of each set that a sweep over the columns, in blocks of so many, chooses when it is there."""
        return self.cuts(inputs)

    def keep_of_sweep(self, scores_OC: Tensor) -> Tensor:
        """What survives of the columns of one such set."""
        return self.keep_top(scores_OC)

    def shuffled_groups(self, inputs: int) -> NM | None:
        """The n:m whose groups a shuffle of so many channels forms; None where there is no whole group."""
        return None

    def parts(self) -> tuple[NM, ...]:
        """The n:m that the pattern is the sum of, each of which can be stored by itself; none where there are none."""
        return ()

    def split(self, keep_OI: Tensor) -> list[Tensor]:
        """A mask that holds the pattern as one for each of `parts`, which between them keep all that it keeps.

        Each keeps exactly as many as may survive of each of its groups: pruned weights, too, where there are too few.
        """
        return []

    @property
    def swap_width(self) -> int | None:
        """Within groups of so many inputs a kept and a pruned weight may change places; None where there are none."""
        return None


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
        keep_OI[..., :whole] = top(scores_OI[..., :whole].unflatten(-1, (-1, self.m)), self.n).flatten(-2)
        tail = scores_OI[..., whole:]
        keep_OI[..., whole:] = top(tail, self._tail_kept(tail.shape[-1]))
        return keep_OI

    def holds(self, keep_OI: Tensor) -> bool:
        return not self.excess(keep_OI).any()

    def excess(self, counts_OI: Tensor) -> Tensor:
        """By how much each group's sum is above what may survive of it (O x G, a shorter last group included)."""
        return (self._counts(counts_OI) - self._allowed(counts_OI)).clamp_(min=0)

    def _counts(self, counts_OI: Tensor) -> Tensor:
        import torch

        groups_OGM = filled(counts_OI, self.m).unflatten(-1, (-1, self.m))
        if self.m > 32:
            return groups_OGM.sum(-1)
        sum_OG = groups_OGM[..., 0].to(torch.int32)
        for place in range(1, self.m):  # several times as fast as a sum over so short a dimension
            sum_OG += groups_OGM[..., place]
        return sum_OG

    def _allowed(self, counts_OI: Tensor) -> Tensor:
        import torch

        allowed = [n for count, n, _ in self.groups(counts_OI.shape[-1]) for _ in range(count)]
        return torch.tensor(allowed, device=counts_OI.device)

    def metadata_bits(self, outputs: int, inputs: int) -> int:
        groups, tail = divmod(inputs, self.m)
        return outputs * (groups * _bits(self.n, self.m) + _bits(self._tail_kept(tail), tail))

    def grouped_inputs(self, inputs: int) -> int:
        """How many of a row's leading inputs stand in whole groups, so that a shuffle can move them between groups."""
        return inputs - inputs % self.m

    def cuts(self, inputs: int) -> list[slice]:
        return [slice(start, min(start + self.m, inputs)) for start in range(0, inputs, self.m)]

    def shuffled_groups(self, inputs: int) -> NM | None:
        return self if self.grouped_inputs(inputs) else None

    def parts(self) -> tuple[NM, ...]:
        return (self,)

    def split(self, keep_OI: Tensor) -> list[Tensor]:
        return [self.exactly(keep_OI)]

    def kept_per_row(self, inputs: int) -> int:
        """How many weights of a row survive."""
        return sum(count * n for count, n, _ in self.groups(inputs))

    def groups(self, inputs: int) -> list[tuple[int, int, int]]:
        """How many groups a row is cut into, how many weights of each survive, and of how many: whole ones, the tail.

        Without those that a row has none of.
        """
        count, tail = divmod(inputs, self.m)
        cut = [(count, self.n, self.m), (1, self._tail_kept(tail), tail)]
        return [(count, n, m) for count, n, m in cut if count * m]

    def exactly(self, keep_OI: Tensor) -> Tensor:
        """A mask that keeps of every group exactly as many as may survive.

        Of too many kept weights those with the lowest index, and where there are too few, pruned weights likewise.
        """
        import torch

        if not (self._counts(keep_OI) - self._allowed(keep_OI)).any():
            return keep_OI
        parts, start = [], 0
        for count, n, m in self.groups(keep_OI.shape[-1]):
            keep_OGM = keep_OI[..., start : start + count * m].unflatten(-1, (count, m))
            first_OGM = keep_OGM & (keep_OGM.cumsum(-1, dtype=torch.int32) <= n)
            short_OG1 = n - first_OGM.sum(-1, keepdim=True, dtype=torch.int32)
            others_OGM = ~keep_OGM
            more_OGM = others_OGM & (others_OGM.cumsum(-1, dtype=torch.int32) <= short_OG1)
            parts.append((first_OGM | more_OGM).flatten(-2))
            start += count * m
        return torch.cat(parts, -1)

    @property
    def swap_width(self) -> int:
        return self.m

    def _tail_kept(self, tail: int) -> int:
        return -(-tail * self.n // self.m)


def top(scores_M: Tensor, n: int) -> Tensor:
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


def filled(x_OI: Tensor, size: int) -> Tensor:
    """The rows, ended with zeros so that `size` divides their length."""
    from torch.nn.functional import pad

    missing = -x_OI.shape[-1] % size
    return pad(x_OI, (0, missing)) if missing else x_OI


def _bits(n: int, m: int) -> int:
    """ceil(log2 C(m, n)), exactly."""
    return (math.comb(m, n) - 1).bit_length()
