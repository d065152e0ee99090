"""n:m beside outliers.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.patterns.nm import NM, Pattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outliers(Pattern):
    """`base` keeps the n best of each group, and of all others the best of long groups (`outliers`) survive as well.

    Structured outliers come from Maximov et al. 2025 (arXiv 2507.03052), where 4, 8 or 16 of 256 stand beside
    2:4 or 8:16. Whether an outlier there takes one of its group's n places is not known to us. Here the places
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

        # What a group keeps beyond its n must be outliers; the sum of that is written at the group's first input.
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
