"""Bias correction: the bias takes over what the pruned weights gave on average.

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
    """The mean of every output on the calibration tokens is what it would be with the dense weights.

    The bias gets (W_dense - W) E[x]. A layer without one is given one, which the model's configuration does not tell;
    experts that share a parameter have no place for it, and the log says so. A shift that the bias is to get already
    is part of the correction, not added to it: the mean is restored either way.
    """

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import ColumnMoments

        return {"moments": ColumnMoments}

    def adds_biases(self) -> bool:
        return True

    def layer(self, layer: Layer, pruned: Solution) -> Solution:
        lost_OI = layer.dense_OI - pruned.weight_OI
        return replace(pruned, bias_shift_O=lost_OI @ layer.stats["moments"].mean_I())
