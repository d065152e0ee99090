"""Bias correction: the bias compensates the average contribution of the pruned weights.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from esparse.recoveries import Recovery

if TYPE_CHECKING:
    from esparse.stats import Factory
    from esparse.updates import Layer, Solution


@dataclass(kw_only=True, slots=True)
class Bias(Recovery):
    """Restores the mean of every output on the calibration tokens to its value with dense weights.

    The bias is shifted by (W_dense - W) E[x]. A layer without a bias gets one, which the model's configuration does not
    show. Experts that share a parameter cannot have a bias: they are skipped, and the log says so. An earlier bias
    shift is replaced, not added to: the mean is restored in both cases.
    """

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnMoments

        return {"moments": ColumnMoments}

    def adds_biases(self) -> bool:
        return True

    def layer(self, layer: Layer, pruned: Solution) -> Solution:
        lost_OI = layer.dense_OI - pruned.weight_OI
        return replace(pruned, bias_shift_O=lost_OI @ layer.stats["moments"].mean_I())
