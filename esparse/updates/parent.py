"""The dense model as the target: a layer that reads what pruned blocks made returns what it returns in the dense model.

A usual update has the pruned layer return on its input X what its dense weights W return on X. But X comes from pruned
blocks, and in the dense model the layer reads Y. With the Gram matrix G = X^T X and the cross Gram matrix C = X^T Y,

    W* = W + trust W (C^T - G) (G + damping)^-1

are, at trust 1, the weights that minimise ||X W*^T - Y W^T||^2 + damping ||W* - W||^2. As X W*^T is the nearest to
Y W^T that X can give, the error of any weights towards Y W^T is their error towards X W*^T and a constant: an update
finds its mask and its weights as before, with W* in the place of W. Quantisation does so: GPTAQ (Li et al. 2025,
arXiv 2504.02692) at trust 1, QEP (Arai & Ichikawa 2025, arXiv 2504.09629) with a trust. Here it is tried on n:m.

What the layers of a block before this one lost is part of it if the inputs are observed again once they are pruned
(`sequential`); else X is what the block's dense layers make of pruned blocks' outputs.

A layer whose output is added to the residual stream can make up for more: the stream that it is added to differs from
the dense model's, too. With E what the stream behind the layer lacks of the dense model's while the layer is dense, and
L = W (C^T - G) what of E^T X the layer's own output lacks, `residual` is the trust in the rest:

    W* = W + (trust L + residual (E^T X - L)) (G + damping)^-1

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.parts import bounds
from esparse.updates import Layer, Solution, Update

if TYPE_CHECKING:
    from esparse.patterns import Pattern
    from esparse.quantise.grids import Grid
    from esparse.stats import Factory


@dataclass(kw_only=True, slots=True)
class Parent(Update):
    """An update towards what the layer returns in the dense model."""

    trust: float  # 0: the usual target | 1: the dense model's
    damp: float  # added to the Gram matrix's diagonal, as a share of its mean
    # As GPTQ's true_sequential: o_proj then makes up for what q, k and v lost, down_proj for gate and up
    sequential: bool  # observe a layer again once those before it in its block are pruned: a pass more for each
    residual: float  # 0: what the residual stream lost stays lost | 1: the layers that add to it make up for all of it
    # Its settings stand behind it: `update.update.damp=0.1`. Another one is chosen by `update@update.update=admm`
    update: Update  # the update itself

    def __post_init__(self) -> None:
        bounds.check("update", self, shares=("trust", "residual"), positive=("damp",))
        if self.residual and not self.sequential:
            raise Mistake(
                "update.residual needs update.sequential: what the stream behind a layer lacks is known once the "
                "layers before it are pruned; use update.sequential=true or update.residual=0"
            )

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import CrossGram, Gram, StreamGram

        stream: dict[str, Factory] = {"stream": StreamGram} if self.residual else {}
        return self.update.collects() | {"gram": Gram, "cross": CrossGram} | stream

    def needs_dense_stream(self) -> bool:
        return True

    def sequential_layers(self) -> bool:
        return self.sequential

    def check(self, pattern: Pattern) -> None:
        self.update.check(pattern)

    def by_rows(self, pattern: Pattern) -> bool:
        return self.update.by_rows(pattern)

    def apply(self, layer: Layer, start: Solution) -> Solution:
        towards = self._towards(layer)
        return self.update.apply(towards, Solution.without_update(towards.dense_OI, start.keep_OI))

    def apply_rounding(self, layer: Layer, start: Solution, grid: Grid) -> Solution:
        from esparse.updates.obs import swept

        towards = self._towards(layer)
        start = Solution.without_update(towards.dense_OI, start.keep_OI)
        after = self.update.apply_rounding(towards, start, grid)
        # Whoever rounds later knows the dense weights alone, and would choose rows that are nearer to these.
        return swept(towards, after, grid) if after.scales is None else after

    def _towards(self, layer: Layer) -> Layer:
        """The layer with W* in the place of W; as it is if its inputs are not those of the same tokens."""
        from esparse.linalg import inverse_times

        gram, cross = layer.stats["gram"], layer.stats["cross"]
        if cross.tokens != gram.tokens:  # an expert is sent other tokens in the dense model
            return layer
        lost_OI = layer.dense_OI @ (cross.cross_II.T - gram.gram_II)
        towards_OI = self.trust * lost_OI
        stream = layer.stats.get("stream")
        if stream is not None and stream.tokens == gram.tokens:
            towards_OI += self.residual * (stream.lacks_OI - lost_OI)
        corrected_OI = layer.dense_OI + inverse_times(towards_OI, gram.gram_II, self.damp)
        return replace(layer, dense_OI=corrected_OI)
