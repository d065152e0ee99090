"""n:m with outliers: some more weights of long groups are kept beside the n:m pattern.

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
    """Keeps the n best weights of each group of `base`, and of the others the k best of each long group of `outliers`.

    Structured outliers come from Maximov et al. 2025 (arXiv 2507.03052): 4, 8 or 16 of 256 beside 2:4 or 8:16. We do
    not know whether an outlier there takes one of its group's n places. Here the n places are filled first, and the
    outliers come from the rest: of all masks that the two formats can store together, this one has the highest scores,
    and it keeps a share of n/m + k/K. `outliers.m` is a multiple of `base.m`, both are cut in the same order, and both
    have tails as in `NM`.
    """

    base: NM
    outliers: NM

    def __str__(self) -> str:
        return f"{self.base}+{self.outliers}"

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        placed_OI = self.base.keep_top(scores_OI)
        # If fewer than k others are left, the outliers include weights that are kept already, which changes nothing.
        return placed_OI | self.outliers.keep_top(scores_OI.masked_fill(placed_OI, -math.inf))

    def holds(self, keep_OI: Tensor) -> bool:
        import torch

        # Weights that a group keeps beyond its n must be outliers; their number is written at the group's first input.
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
        """The base's groups: a shuffle that fills them better needs fewer outliers."""
        return self.base.shuffled_groups(inputs)

    @property
    def swap_width(self) -> int:
        return self.base.m  # a swap does not change the number of weights beyond n
