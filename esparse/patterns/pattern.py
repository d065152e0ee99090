"""What every pattern can do, and a pattern whose groups are cut in another order of the channels.

Shapes: O outputs, I inputs, M weights that compete with each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns.groups import NM


class Pattern(ABC):
    """A rule that says how many weights of which sets survive; by default a row is cut into no groups."""

    @abstractmethod
    def keep_top(self, scores_OI: Tensor) -> Tensor:
        """The highest scores that the pattern lets survive: a boolean keep mask of the same shape."""

    @abstractmethod
    def holds(self, keep_OI: Tensor) -> bool:
        """Whether no set keeps more weights than the pattern allows."""

    @abstractmethod
    def metadata_bits(self, outputs: int, inputs: int) -> int:
        """Bits that say which weights of one matrix survive, every group in the fewest bits that tell its choices.

        Without groups a flag per weight, or per column, row or block. What a kernel's format takes may be more.
        """

    def cuts(self, inputs: int) -> list[slice]:
        """The inputs of each set that `keep_top` can choose by itself, in order, a shorter last one included."""
        return [slice(0, inputs)]

    def shuffled_groups(self, inputs: int) -> NM | None:
        """The n:m whose groups a shuffle of so many channels forms; None where there is no whole group."""
        return None

    def parts(self) -> tuple[NM, ...]:
        """The n:m that the pattern is the sum of, each of which can be stored by itself; none where there are none."""
        return ()

    def split(self, keep_OI: Tensor) -> list[Tensor]:
        """A mask that holds the pattern as one for each of `parts`, which between them keep all that it keeps.

        Each keeps exactly as many as may survive of each of its groups: pruned weights, too, where there are too few.
        """
        return []

    @property
    def swap_width(self) -> int | None:
        """Within groups of so many inputs a kept and a pruned weight may change places; None where there are none."""
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """A pattern whose groups are cut in an order of the channels; masks and scores stay in the channels' own order.

    `order_I[k]` is the channel that stands at place k; None is the channels' own order.
    """

    pattern: Pattern
    order_I: Tensor | None = None

    def keep_top(self, scores_OI: Tensor) -> Tensor:
        """The keep mask of these scores."""
        return self.restored(self.pattern.keep_top(self.ordered(scores_OI)))

    def holds(self, keep_OI: Tensor) -> bool:
        """Whether no group keeps more weights than the pattern allows."""
        return self.pattern.holds(self.ordered(keep_OI))

    def ordered(self, x_OI: Tensor) -> Tensor:
        """The columns as they stand when the groups are cut."""
        return x_OI if self.order_I is None else x_OI[:, self.order_I]

    def restored(self, x_OI: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        import torch

        return x_OI if self.order_I is None else torch.empty_like(x_OI).index_copy_(1, self.order_I, x_OI)


def top(scores_M: Tensor, n: int) -> Tensor:
    """Keeps the `n` highest of the last dimension, the lowest index first among equals."""
    import torch

    m = scores_M.shape[-1]
    if m > 16:
        order = scores_M.argsort(dim=-1, descending=True, stable=True)[..., :n]
        return torch.zeros_like(scores_M, dtype=torch.bool).scatter_(-1, order, True)
    # All pairs are compared: for the usual small groups 2 to 5 times faster than sorting.
    columns = scores_M.movedim(-1, 0).contiguous()
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=columns.device)
    for left in range(m):
        for right in range(left + 1, m):
            left_wins = columns[left] >= columns[right]  # `>=`: the lower index wins a tie
            rank[right] += left_wins
            rank[left] += ~left_wins
    return (rank < n).movedim(0, -1)


def filled(x_OI: Tensor, size: int) -> Tensor:
    """The rows, ended with zeros so that `size` divides their length."""
    from torch.nn.functional import pad

    missing = -x_OI.shape[-1] % size
    return pad(x_OI, (0, missing)) if missing else x_OI
