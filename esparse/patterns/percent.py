"""Patterns that remove a percentage: unstructured, and structured ones for comparison.

Shapes: O outputs, I inputs, S strips of rows, B blocks of one strip.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from esparse.patterns.nm import Pattern, filled, top

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Unstructured(Pattern):
    """Removes `removed_percent` per cent (rounded down) of every row's weights, in any places.

    SparseGPT's sweep chooses differently, as its authors do: that percentage of each block of columns over all rows,
    including the weight on the border. Therefore the pattern holds if a matrix keeps no more than all rows together
    may.
    """

    removed_percent: float

    def __str__(self) -> str:
        return _percent(self.removed_percent)

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        return top(scores_OI, _left(scores_OI.shape[-1], self.removed_percent))

    def sweep_cuts(self, inputs: int, block: int) -> list[slice]:
        return [slice(start, min(start + block, inputs)) for start in range(0, inputs, block)]

    def keep_of_sweep(self, scores_OC: Tensor) -> Tensor:
        # As in SparseGPT's code: removes all scores up to the one at place int(share * number) of the sorted scores.
        border = scores_OC.numel() - _left(scores_OC.numel(), self.removed_percent)
        return scores_OC > scores_OC.flatten().kthvalue(border + 1).values

    def holds(self, keep_OI: Tensor) -> bool:
        return int(keep_OI.sum()) <= keep_OI[..., 0].numel() * _left(keep_OI.shape[-1], self.removed_percent)

    def metadata_bits(self, outputs: int, inputs: int) -> int:
        return outputs * inputs


@dataclass(frozen=True, slots=True)
class Columns(Pattern):
    """Removes whole columns: `removed_percent` per cent (rounded down) of the inputs, of the lowest mean scores."""

    removed_percent: float

    def __str__(self) -> str:
        return f"{_percent(self.removed_percent)}@columns"

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        import torch

        # float64, so that the choice does not depend on a device's order of summation.
        keep_I = top(scores_OI.mean(0, dtype=torch.float64), _left(scores_OI.shape[1], self.removed_percent))
        return keep_I.repeat(len(scores_OI), 1)

    def holds(self, keep_OI: Tensor) -> bool:
        return int(keep_OI.any(0).sum()) <= _left(keep_OI.shape[1], self.removed_percent)

    def metadata_bits(self, outputs: int, inputs: int) -> int:
        return inputs


@dataclass(frozen=True, slots=True)
class Rows(Pattern):
    """Removes whole rows: `removed_percent` per cent (rounded down) of the outputs, of the lowest mean scores."""

    removed_percent: float

    def __str__(self) -> str:
        return f"{_percent(self.removed_percent)}@rows"

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        import torch

        keep_O = top(scores_OI.mean(1, dtype=torch.float64), _left(len(scores_OI), self.removed_percent))
        return keep_O[:, None].repeat(1, scores_OI.shape[1])

    def holds(self, keep_OI: Tensor) -> bool:
        return int(keep_OI.any(1).sum()) <= _left(len(keep_OI), self.removed_percent)

    def metadata_bits(self, outputs: int, inputs: int) -> int:
        return outputs


@dataclass(frozen=True, slots=True)
class Tiles(Pattern):
    """Removes whole tiles: `removed_percent` per cent (rounded down) of the tiles of each strip of `height` outputs.

    A tile is `width` inputs wide. Tiles with the lowest mean score are removed; a sum would favour the smaller tiles at
    the lower and the right edge of the matrix.
    """

    removed_percent: float
    height: int
    width: int

    def __str__(self) -> str:
        return f"{_percent(self.removed_percent)}@{self.height}x{self.width}"

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        import torch

        outputs, inputs = scores_OI.shape
        rows_S, columns_B = _sizes(outputs, self.height), _sizes(inputs, self.width)
        weights_SB = torch.tensor(rows_S)[:, None] * torch.tensor(columns_B)
        mean_SB = self._blocks(scores_OI).sum((1, 3), dtype=torch.float64) / weights_SB.to(scores_OI.device)
        keep_SB = top(mean_SB, _left(len(columns_B), self.removed_percent))
        keep_OB = keep_SB.repeat_interleave(self.height, 0)[:outputs]
        return keep_OB.repeat_interleave(self.width, 1)[:, :inputs].contiguous()

    def holds(self, keep_OI: Tensor) -> bool:
        kept_SB = self._blocks(keep_OI).sum((1, 3)) > 0
        return bool((kept_SB.sum(1) <= _left(kept_SB.shape[1], self.removed_percent)).all())

    def metadata_bits(self, outputs: int, inputs: int) -> int:
        return len(_sizes(outputs, self.height)) * len(_sizes(inputs, self.width))

    def _blocks(self, x_OI: Tensor) -> Tensor:
        """Strips x height x blocks x width, padded with zeros."""
        filled_OI = filled(filled(x_OI, self.width).T, self.height).T
        return filled_OI.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height))


def _percent(percent: float) -> str:
    return f"{Decimal(repr(percent)).normalize():f}%"  # all digits, and never 1e-05


def _left(count: int, removed_percent: float) -> int:
    """The number that remains of `count` after removing this percentage, rounded down."""
    return count - int(count * removed_percent / 100 + 1e-9)


def _sizes(length: int, size: int) -> list[int]:
    """The lengths of the parts if a length is cut into parts of this size."""
    return [min(size, length - start) for start in range(0, length, size)]
