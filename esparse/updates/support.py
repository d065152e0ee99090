"""Least squares on the support: the best weights for a given keep mask.

Minimises ||X (W_dense - W)^T||_F with W zero off the mask, row by row, by conjugate gradients: the last step of ALPS
(Meng et al. 2024, arXiv 2406.07831) by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.parts import bounds
from esparse.patterns import Rows
from esparse.updates import Layer, Solution, Update

if TYPE_CHECKING:
    from esparse.patterns import Pattern
    from esparse.stats import Factory


@dataclass(kw_only=True, slots=True)
class Support(Update):
    """Keeps the mask; sets the kept weights to those of least error on the calibration tokens."""

    # It grows if the matrix is singular, and the log says so
    damp: float  # added to the Gram matrix's diagonal, as a share of its mean
    iterations: int  # of conjugate gradients, at most
    tolerance: float  # conjugate gradients end once the residual is so small a share of the first one

    def __post_init__(self) -> None:
        bounds.check("update", self, positive=("iterations",), not_negative=("damp", "tolerance"))

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram}

    def is_idle(self, pattern: Pattern) -> bool:
        return isinstance(pattern, Rows)  # a kept row has its least error already, which is none

    def apply(self, layer: Layer, start: Solution) -> Solution:
        from esparse.linalg import damped, solve_on_support

        weight_OI = solve_on_support(
            damped(layer.stats["gram"].gram_II, self.damp),
            layer.dense_OI,
            start.keep_OI,
            start.weight_OI,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        return Solution(weight_OI, start.keep_OI)
