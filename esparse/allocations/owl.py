"""OWL (Yin et al. 2023, arXiv 2310.05175): layers with more outliers keep more weights.

Shapes: O outputs, I inputs, K classes of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.allocations import Allocation, Measured
from esparse.allocations.budget import Shape, Unit, spend
from esparse.allocations.reach import POINTS, others, refuse_what_cannot_change
from esparse.errors import Mistake
from esparse.parts import bounds

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.stats import Factory
    from esparse.updates import Layer

PER = ("block", "group")
# Scores are counted in classes by their float32 without its lowest 15 bits (0.4 % wide), because storing all scores
# until the block's mean is known would take as much memory as the block.
DROPPED_BITS = 15


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A histogram of one layer's Wanda scores."""

    shape: Shape
    sum: float
    classes_K: Tensor  # int32, ascending: the classes with scores
    counts_K: Tensor

    def above(self, bound: float) -> float:
        """The number of scores above the bound, assuming an even spread within the bound's class."""
        import torch

        of_bound = torch.tensor(bound, dtype=torch.float32)
        own = int(of_bound.view(torch.int32)) >> DROPPED_BITS
        low, high = (torch.tensor((own + k) << DROPPED_BITS, dtype=torch.int32).view(torch.float32) for k in (0, 1))
        share = float((high - of_bound) / (high - low))
        whole = int(self.counts_K[self.classes_K > own].sum())
        return whole + share * int(self.counts_K[self.classes_K == own].sum())


@dataclass(kw_only=True, slots=True)
class Owl(Allocation):
    """The density rises with the layer's share of outliers, which are scores far above the mean.

    The scores are Wanda's, whatever the metric. As in the authors' code, the target densities span 2 * spread and have
    the given mean, so if the shares are skewed, one end is farther than `spread` from the mean. The authors' n:m
    variant rounds every block by itself and loses the mean; here n is chosen so that the mean is kept and the squared
    distance to the targets, over all weights, is least. A layer that no token reached keeps the method's pattern.
    """

    threshold: float  # a score is an outlier above so many times the mean (M in the paper)
    # A spread that cannot change the pattern is refused: 2:4 has steps of 0.25, 8:16 of 0.0625
    spread: float  # half the range of the densities wished for (lambda in the paper)
    per: str  # layers that get one pattern: block (all of a decoder block) | group (those that read one tensor)

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise Mistake(f"allocation.per must be one of {', '.join(PER)}, got {self.per!r}")
        bounds.check("allocation", self, positive=("threshold",))
        if not 0 < self.spread < 1:
            raise Mistake(f"allocation.spread must lie between 0 and 1, got {self.spread}")

    def check(self, pattern: Pattern) -> None:
        # If all targets lie within less than one step of each other, no change of n comes nearer to them.
        refuse_what_cannot_change("owl", pattern, self.spread, reach=2 * self.spread, points=POINTS)

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnNorm

        return {"norm": ColumnNorm}

    def measures(self) -> bool:
        return True

    def measure(self, layer: Layer, score_OI: Tensor) -> Scores | None:
        import torch

        if not layer.stats.tokens:
            return None
        wanda_OI = layer.dense_OI.abs() * layer.stats["norm"].norm_I("sequence")
        classes = wanda_OI.contiguous().view(torch.int32).flatten() >> DROPPED_BITS
        counts = torch.bincount(classes).cpu()
        there_K = counts.nonzero().squeeze(1)
        return Scores(
            shape=Shape(layer.stats.name, *wanda_OI.shape),
            sum=float(wanda_OI.sum(dtype=torch.float64)),
            classes_K=there_K.int(),
            counts_K=counts[there_K],
        )

    def plan(self, layers: Sequence[Measured], pattern: Pattern) -> dict[str, Pattern]:
        together: dict[int, list[Scores]] = {}
        for layer in layers:
            if layer.value is not None:
                together.setdefault(layer.block if self.per == "block" else layer.group, []).append(layer.value)
        patterns = others(pattern, 2 * self.spread)
        units = [Unit.of([scores.shape for scores in unit], pattern, patterns) for unit in together.values()]
        ratios = [outlier_ratio(unit, self.threshold) for unit in together.values()]
        wishes = offsets(ratios, [unit.weights for unit in units], self.spread)
        return spend(units, [_distances(unit, wish) for unit, wish in zip(units, wishes, strict=True)])


def outlier_ratio(layers: Sequence[Scores], threshold: float) -> float:
    """The share of these layers' scores above `threshold` times their common mean."""
    weights = sum(scores.shape.outputs * scores.shape.inputs for scores in layers)
    bound = threshold * sum(scores.sum for scores in layers) / weights
    if not bound:  # all scores are 0, so none is an outlier
        return 0.0
    return sum(scores.above(bound) for scores in layers) / weights


def offsets(ratios: Sequence[float], weights: Sequence[int], spread: float) -> list[float]:
    """The targets' distances above the mean density; their mean over all weights is 0, their range 2 * spread.

    With outlier ratios D the paper's sparsity is 1 - density - offset, and
    offset_l = 2 * spread * (D_l - min D) / (max D - min D), less its mean; all 0 if all D are equal.
    """
    low, high = min(ratios, default=0.0), max(ratios, default=0.0)
    if low == high:
        return [0.0] * len(ratios)
    scaled = [2 * spread * (ratio - low) / (high - low) for ratio in ratios]
    mean = sum(s * w for s, w in zip(scaled, weights, strict=True)) / sum(weights)
    return [s - mean for s in scaled]


def _distances(unit: Unit, offset: float) -> list[float]:
    """The cost of each pattern: its density's squared distance to the target, times the number of weights."""
    wish = unit.kept[unit.asked] / unit.weights + offset
    return [unit.weights * (kept / unit.weights - wish) ** 2 for kept in unit.kept]
