"""Quantisers: what the kept values of a pruned layer are rounded to.

Some consecutive columns of a row, a group, share a scale; their order is that in which the pattern's groups are cut.
What a mask removes stays zero and is stored nowhere: a scale is that of the kept values alone.

Shapes: O outputs, I inputs, G groups of a row, C columns of a group. Polarity: True in `keep` means that the weight
survives, in `whole` that it is not rounded.
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
    """By what the codes of one matrix become its values; columns are in the order in which groups are cut.

    `scale_OG` (float32, but each a value of the precision that scales are stored in), `zero_OG` (uint8: the code of
    zero; None where all groups have the same), `whole_OI` (bool: salient weights that stay in 16 bits; None without).
    """

    scale_OG: Tensor
    zero_OG: Tensor | None = None
    whole_OI: Tensor | None = None

    def rows(self, part: slice) -> Scales:
        """Those of some rows."""
        others = (None if x is None else x[part] for x in (self.zero_OG, self.whole_OI))
        return Scales(self.scale_OG[part], *others)


@dataclass(kw_only=True, slots=True)
class Quantise(ABC):  # noqa: B024 - what rounds nothing has no method to write
    """Rounds kept values to a grid; does nothing by itself."""

    def collects(self) -> dict[str, Factory]:
        """The statistics of a layer's input that rounding looks at, by name; none by default."""
        return {}

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError where the settings make no sense for this pattern; called before anything runs."""
        return None

    def ready(self, widths: Iterable[tuple[str, int]]) -> None:
        """Raises ValueError where layers of these names and inputs cannot be quantised; called before pruning."""
        return None


@dataclass(kw_only=True, slots=True)
class NoQuantise(Quantise):
    """Values stay in the model's precision."""
