"""The base class of patterns, and the pattern of groups, n:m.

Shapes: O outputs, I inputs, G groups, M = m competing weights of a group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Pattern(ABC):
    """A rule for how many weights of which sets are kept; by default rows are not cut into groups."""

    @abstractmethod
    def keep_top(self, scores_OI: Tensor) -> Tensor:
        """The keep mask (bool, same shape) of the highest scores that the pattern allows."""

    @abstractmethod
    def holds(self, keep_OI: Tensor) -> bool:
        """Whether no set keeps more weights than the pattern allows."""

    @abstractmethod
    def metadata_bits(self, outputs: int, inputs: int) -> int:
        """The bits that record which weights of a matrix are kept, with the fewest bits per group.

        Patterns without groups take one bit per weight, or per column, row or block. A kernel's format may take more.
        """

    def cuts(self, inputs: int) -> list[slice]:
        """The inputs of each set that `keep_top` chooses independently, in order, including a shorter last set."""
        return [slice(0, inputs)]

    def sweep_cuts(self, inputs: int, block: int) -> list[slice]:
        """The inputs of each set that a column sweep in blocks of `block` columns chooses at one time."""
        return self.cuts(inputs)

    def keep_of_sweep(self, scores_OC: Tensor) -> Tensor:
        """The keep mask of one such set's columns."""
        return self.keep_top(scores_OC)

    def shuffled_groups(self, inputs: int) -> NM | None:
        """The n:m whose groups a shuffle of `inputs` channels forms; None if there is no whole group."""
        return None

    def parts(self) -> tuple[NM, ...]:
        """The n:m patterns that add up to this pattern and can be stored separately; empty for patterns without n:m."""
        return ()

    def split(self, keep_OI: Tensor) -> list[Tensor]:
        """Splits a mask that holds the pattern into one mask for each of `parts`, whose union covers it.

        Each of them keeps exactly the allowed number in each group, and includes pruned weights if there are too few.
        """
        return []

    @property
    def swap_width(self) -> int | None:
        """The width of groups in which a kept and a pruned weight may be exchanged; None if there are no groups."""
        return None


@dataclass(frozen=True, slots=True)
class NM(Pattern):
    """Keeps `n` weights of every `m` consecutive inputs of a row.

    If `m` does not divide the width, a row ends in a shorter group (the tail) of r weights, of which ceil(r * n / m)
    are kept, so the tail never loses more than its share. Hardware kernels refuse such widths; quality can be measured.
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
        """The excess of each group's sum over the allowed number (O x G, including a shorter last group)."""
        return (self._counts(counts_OI) - self._allowed(counts_OI)).clamp_(min=0)

    def _counts(self, counts_OI: Tensor) -> Tensor:
        import torch

        groups_OGM = filled(counts_OI, self.m).unflatten(-1, (-1, self.m))
        if self.m > 32:
            return groups_OGM.sum(-1)
        sum_OG = groups_OGM[..., 0].to(torch.int32)
        for place in range(1, self.m):  # several times faster than a sum over such a short dimension
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
        """The number of a row's inputs in whole groups, which a shuffle can move between groups."""
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
        """The number of kept weights of a row."""
        return sum(count * n for count, n, _ in self.groups(inputs))

    def groups(self, inputs: int) -> list[tuple[int, int, int]]:
        """(number of groups, kept weights, weights) of a row's whole groups and of its tail.

        Leaves out whichever a row does not have.
        """
        count, tail = divmod(inputs, self.m)
        cut = [(count, self.n, self.m), (1, self._tail_kept(tail), tail)]
        return [(count, n, m) for count, n, m in cut if count * m]

    def exactly(self, keep_OI: Tensor) -> Tensor:
        """A mask that keeps exactly the allowed number in every group.

        Of too many kept weights it keeps the lowest indices; if there are too few, it adds the lowest pruned ones.
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
    """The keep mask of the `n` highest values of the last dimension; ties go to the lowest index."""
    import torch

    m = scores_M.shape[-1]
    if m > 16:
        order = scores_M.argsort(dim=-1, descending=True, stable=True)[..., :n]
        return torch.zeros_like(scores_M, dtype=torch.bool).scatter_(-1, order, True)
    # Compares all pairs: for the usual small groups 2 to 5 times faster than sorting.
    columns = scores_M.movedim(-1, 0).contiguous()
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=columns.device)
    for left in range(m):
        for right in range(left + 1, m):
            left_wins = columns[left] >= columns[right]  # `>=`: the lower index wins a tie
            rank[right] += left_wins
            rank[left] += ~left_wins
    return (rank < n).movedim(0, -1)


def filled(x_OI: Tensor, size: int) -> Tensor:
    """The rows, padded with zeros so that `size` divides their length."""
    from torch.nn.functional import pad

    missing = -x_OI.shape[-1] % size
    return pad(x_OI, (0, missing)) if missing else x_OI


def _bits(n: int, m: int) -> int:
    """ceil(log2 C(m, n)), exactly."""
    return (math.comb(m, n) - 1).bit_length()
