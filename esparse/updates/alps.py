"""ALPS (Meng et al. 2024, arXiv 2406.07831): ADMM on the layer error with a growing penalty until the support settles,
then conjugate gradients on that support.

Shapes: O outputs, I inputs. Polarity: True in `keep` means the weight is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.updates import Layer, Solution, Update

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.stats import Factory

CHECK_EVERY = 3  # iterations between two checks of the support
PENALTY_STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # (least change of the support, factor of the penalty)
SETTLED, SETTLED_AFTER = 3e-4, 30  # a smaller change ends the iteration, after at least so many iterations


@dataclass(slots=True, eq=False)
class Inverse:
    """(G + penalty)^-1, by G's eigenvalues and eigenvectors, for one penalty after the other."""

    rows: int  # of what is multiplied
    values_I: Tensor
    vectors_II: Tensor
    penalty: float | None = None
    of_penalty_II: Tensor | None = None

    def times(self, x_OI: Tensor, penalty: float) -> Tensor:
        """X (G + penalty)^-1."""
        shrunk_I = (self.values_I + penalty).reciprocal()
        if CHECK_EVERY * self.rows <= len(shrunk_I):  # making the inverse would take more than it spares
            return (x_OI @ self.vectors_II) * shrunk_I @ self.vectors_II.T
        if penalty != self.penalty or self.of_penalty_II is None:
            self.penalty, self.of_penalty_II = penalty, (self.vectors_II * shrunk_I) @ self.vectors_II.T
        return x_OI @ self.of_penalty_II


@dataclass(kw_only=True, slots=True)
class Alps(Update):
    """Finds mask and weights of small layer error by the penalty method, from the dense weights."""

    # It grows if the matrix is singular, and the log says so
    damp: float  # added to the Gram matrix's diagonal, as a share of its mean
    penalty: float  # rho, at the beginning
    iterations: int  # of the penalty method, at most
    gradient_iterations: int  # of conjugate gradients on the support
    tolerance: float  # conjugate gradients end once the residual is so small a share of the first one

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram}

    def apply(self, layer: Layer, start: Solution) -> Solution:
        import torch

        from esparse.linalg import damped, scaled, solve_on_support

        gram_II, norm_I = scaled(damped(layer.stats["gram"].gram_II, self.damp))
        dense_OI = layer.dense_OI * norm_I
        target_OI = dense_OI @ gram_II
        inverse = Inverse(len(dense_OI), *layer.stats["gram"].scaled_eigen(self.damp))
        penalty, raised = self.penalty, False
        split_OI, dual_OI = dense_OI, torch.zeros_like(dense_OI)
        keep_OI = last_OI = layer.grouping.keep_top(dense_OI.abs())
        for step in range(self.iterations):
            weight_OI = inverse.times(target_OI - dual_OI + penalty * split_OI, penalty)
            moved_OI = weight_OI + dual_OI / penalty
            keep_OI = layer.grouping.keep_top(moved_OI.abs())
            split_OI = moved_OI * keep_OI
            dual_OI = dual_OI + penalty * (weight_OI - split_OI)
            if (step + 1) % CHECK_EVERY:
                continue
            change = int((keep_OI != last_OI).sum()) / max(1, int(keep_OI.sum()))
            last_OI = keep_OI
            if change == 0 and not raised and penalty > self.penalty * 1e-3:
                # The initial penalty was so strong that it froze the first support: starts again with a weaker one.
                penalty /= 5
                split_OI, dual_OI = dense_OI, torch.zeros_like(dense_OI)
                continue
            if change == 0 or (step >= SETTLED_AFTER and change < SETTLED):
                break
            penalty *= next(factor for bound, factor in PENALTY_STEPS if change > bound)
            raised = True
        weight_OI = solve_on_support(
            gram_II, dense_OI, keep_OI, split_OI, iterations=self.gradient_iterations, tolerance=self.tolerance
        )
        return Solution(weight_OI / norm_I, keep_OI)
