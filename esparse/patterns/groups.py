"""Patterns of groups: n:m, and n:m beside salient weights.

Shapes: O outputs, I inputs, G groups, M = m weights of one group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.patterns.pattern import Pattern, filled, top

if TYPE_CHECKING:
    from torch import Tensor


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
        keep_OI[..., whole:] = top(tail, self._tail_survivors(tail.shape[-1]))
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
        return outputs * (groups * _bits(self.n, self.m) + _bits(self._tail_survivors(tail), tail))

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

    def survivors(self, inputs: int) -> int:
        """How many weights of a row survive."""
        return sum(count * n for count, n, _ in self.groups(inputs))

    def groups(self, inputs: int) -> list[tuple[int, int, int]]:
        """How many groups a row is cut into, how many weights of each survive, and of how many: whole ones, the tail.

        Without those that a row has none of.
        """
        count, tail = divmod(inputs, self.m)
        cut = [(count, self.n, self.m), (1, self._tail_survivors(tail), tail)]
        return [(count, n, m) for count, n, m in cut if count * m]

    def exactly(self, keep_OI: Tensor) -> Tensor:
        """A mask that keeps of every group exactly as many as may survive.

        Of too many survivors those with the lowest index, and where there are too few, pruned weights likewise.
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

    def _tail_survivors(self, tail: int) -> int:
        return -(-tail * self.n // self.m)


@dataclass(frozen=True, slots=True)
class Salient(Pattern):
    """`base` keeps the n best of each group, and of all others the best of long groups (`outliers`) survive as well.

    Structured salient weights come from Maximov et al. 2025 (arXiv 2507.03052), where 4, 8 or 16 of 256 stand beside
    2:4 or 8:16. Whether a salient weight there takes one of its group's n places is not known to us. Here the places
    go first, and what they cannot hold is recovered: of all masks that the two formats can store together, that is the
    one with the highest scores, and a share of n/m + k/K survives. `outliers.m` is a multiple of `base.m`, both are
    cut in one order, and both have tails as in `NM`.
    """

    base: NM
    outliers: NM

    def __str__(self) -> str:
        return f"{self.base}+{self.outliers}"

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        placed_OI = self.base.keep_top(scores_OI)
        # Where fewer than k others are left, the outliers take weights again that survive, which changes nothing.
        return placed_OI | self.outliers.keep_top(scores_OI.masked_fill(placed_OI, -math.inf))

    def holds(self, keep_OI: Tensor) -> bool:
        import torch

        # What a group keeps beyond its n must be salient; the sum of that is written at the group's first input.
        beyond_OI = torch.zeros_like(keep_OI, dtype=torch.int32)
        beyond_OI[..., :: self.base.m] = self.base.excess(keep_OI).int()
        return not self.outliers.excess(beyond_OI).any()

    def metadata_bits(self, outputs: int, inputs: int) -> int:
        return self.base.metadata_bits(outputs, inputs) + self.outliers.metadata_bits(outputs, inputs)

    def cuts(self, inputs: int) -> list[slice]:
        return self.outliers.cuts(inputs)

    def parts(self) -> tuple[NM, ...]:
        return (self.base, self.outliers)

    def split(self, keep_OI: Tensor) -> list[Tensor]:
        placed_OI = self.base.exactly(keep_OI)
        return [placed_OI, self.outliers.exactly(keep_OI & ~placed_OI)]

    def shuffled_groups(self, inputs: int) -> NM | None:
        """That of the base: what its groups can hold need not be recovered."""
        return self.base.shuffled_groups(inputs)

    @property
    def swap_width(self) -> int:
        return self.base.m  # a swap keeps the count of its group, and with it what is beyond n


def _bits(n: int, m: int) -> int:
    """ceil(log2 C(m, n)), exactly."""
    return (math.comb(m, n) - 1).bit_length()
