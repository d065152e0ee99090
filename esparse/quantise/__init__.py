"""Quantisers: round the kept values of a pruned layer to a grid.

Consecutive columns of a row, a group, share a scale; columns are in the order in which the pattern's groups are cut.
Pruned weights stay zero and are not stored: a scale is fitted to kept values only.

Shapes: O outputs, I inputs, G groups of a row, C columns of a group. Polarity: True in `keep` means that the weight is
kept, in `whole` that it is not rounded.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.stats import Factory


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """The parameters that turn the codes of one matrix into its values; columns are in group order.

    `scale_OG` (float32, but each a value of the dtype in which scales are stored), `zero_OG` (uint8: the code of zero;
    None if all groups have the same one), `whole_OI` (bool: outliers that stay in 16 bits; None without them).
    """

    scale_OG: Tensor
    zero_OG: Tensor | None = None
    whole_OI: Tensor | None = None

    def rows(self, part: slice | Tensor) -> Scales:
        """The parameters of some rows."""
        others = (None if x is None else x[part] for x in (self.zero_OG, self.whole_OI))
        return Scales(self.scale_OG[part], *others)


@dataclass(kw_only=True, slots=True)
class Quantise(ABC):  # noqa: B024 - what rounds nothing has no method to write
    """Base class of quantisers, which round kept values to a grid; does nothing by itself."""

    def collects(self) -> dict[str, Factory]:
        """The input statistics that rounding needs, by name; default: none."""
        return {}

    def check(self, pattern: Pattern) -> None:
        """Raises Mistake if the settings do not fit this pattern; called before anything runs."""
        return None

    def ready(self, widths: Iterable[tuple[str, int]]) -> None:
        """Raises Mistake if layers of these names and inputs cannot be quantised; called before pruning."""
        return None


@dataclass(kw_only=True, slots=True)
class NoQuantise(Quantise):
    """No quantisation: values stay in the model's dtype."""
