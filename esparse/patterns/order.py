"""Patterns whose groups are cut in another order of the channels.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.patterns.nm import Pattern

if TYPE_CHECKING:
    from torch import Tensor


def check_order(order_I: Tensor, inputs: int) -> None:
    """Raises ValueError if a tensor, for instance from a file, is not an order of this many channels."""
    import torch

    if order_I.ndim != 1 or not torch.equal(order_I.long().sort().values, torch.arange(inputs, device=order_I.device)):
        raise ValueError(
            f"the order of its {inputs} channels does not name each of them once: the file that holds it is damaged"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """A pattern whose groups are cut in an order of the channels; masks and scores stay in the channels' own order.

    `order_I[k]` is the channel at place k; None is the channels' own order.
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
        """The columns in group order."""
        return x_OI if self.order_I is None else x_OI[:, self.order_I]

    def restored(self, x_OI: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        import torch

        return x_OI if self.order_I is None else torch.empty_like(x_OI).index_copy_(1, self.order_I, x_OI)
