"""SparseGPT's column sweep (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

Column by column, what pruning a weight costs is moved to the columns that are still to come, by the inverse of the
input's Gram matrix. Shapes: O outputs, I inputs. Polarity: True in `keep` means the weight survives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.updates import Layer, Solution, Update

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.stats import Factory

MASKS = ("start", "own")
INNER = 16  # columns


@dataclass(kw_only=True, slots=True)
class Obs(Update):
    """The sweep on the mask that it is given, or on one that it chooses group by group as it goes."""

    mask: str  # start: as the metric, or the update before, chose it | own: chosen anew from the repaired weights
    damp: float  # added to the Gram matrix's diagonal, as a share of its mean
    block: int  # columns whose repair of all later columns is done in one product

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"update.mask must be one of {', '.join(MASKS)}, got {self.mask!r}")
        if self.damp <= 0:
            raise ValueError(f"update.damp must be positive, got {self.damp:g}")
        if self.block < 1:
            raise ValueError(f"update.block must be positive, got {self.block}")

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram}

    def by_rows(self, pattern: Pattern) -> bool:
        return self.mask == "start" or bool(pattern.parts())

    def apply(self, layer: Layer, start: Solution) -> Solution:
        grouping = layer.grouping
        upper_II = layer.stats["gram"].inverse_factor(grouping.order_I, self.damp)
        fixed_OI = grouping.ordered(start.keep_OI) if self.mask == "start" else None
        weight_OI, keep_OI = sweep(
            grouping.ordered(layer.dense_OI), upper_II, grouping.pattern, fixed_OI, block=self.block
        )
        return Solution(grouping.restored(weight_OI), grouping.restored(keep_OI))


def sweep(
    dense_OI: Tensor, upper_II: Tensor, pattern: Pattern, fixed_OI: Tensor | None, *, block: int
) -> tuple[Tensor, Tensor]:
    """The repaired weights and their keep mask, columns in the order in which groups are cut.

    `upper_II` is U with U^T U = H^-1. Where `fixed_OI` is None each group of the pattern is chosen when the sweep
    reaches it, by w^2 / U_jj^2 of the weights as they are by then.
    """
    import torch

    # Transposed, a column lies in one piece.
    weight_IO = dense_OI.T.contiguous()
    inputs = len(weight_IO)
    if fixed_OI is None:
        keep_IO, cuts = torch.ones_like(weight_IO, dtype=torch.bool), pattern.cuts(inputs)
    else:
        keep_IO, cuts = fixed_OI.T.contiguous(), [slice(0, inputs)]
    groups = {cut.start: cut for cut in cuts} if fixed_OI is None else {}
    diagonal_I = upper_II.diagonal()
    errors_IO = torch.empty_like(weight_IO)

    def advance(start: int, end: int, sizes: tuple[int, ...]) -> None:
        """Prunes the columns from start to end, and repairs those up to end."""
        if sizes:
            for first, last in _blocks(_clipped(cuts, start, end), sizes[0]):
                advance(first, last, sizes[1:])
                weight_IO[last:end].addmm_(upper_II[first:last, last:end].T, errors_IO[first:last], alpha=-1)
            return
        # All views at once: for few rows, cutting them one by one takes longer than what is done to them.
        weights, keeps, errors, diagonal = (
            whole[start:end].unbind() for whole in (weight_IO, keep_IO, errors_IO, diagonal_I)
        )
        for column, (weight_O, keep_O, error_O, pivot) in enumerate(
            zip(weights, keeps, errors, diagonal, strict=True), start
        ):
            if column in groups:
                cut = groups[column]
                keep_IO[cut] = pattern.keep_top((weight_IO[cut] / diagonal_I[cut, None]).square().T).T
            torch.div(weight_O, pivot, out=error_O).masked_fill_(keep_O, 0.0)
            weight_IO[column:end].addr_(upper_II[column, column:end], error_O, alpha=-1)

    # Within a block again blocks: what is repaired column by column should stay in the cache.
    advance(0, inputs, (block, INNER) if block > INNER else (block,))
    weight_IO.masked_fill_(~keep_IO, 0.0)
    return weight_IO.T.contiguous(), keep_IO.T.contiguous()


def _clipped(cuts: list[slice], start: int, end: int) -> list[slice]:
    """The parts of the cuts from start to end."""
    inside = (slice(max(cut.start, start), min(cut.stop, end)) for cut in cuts)
    return [cut for cut in inside if cut.start < cut.stop]


def _blocks(cuts: list[slice], block: int) -> list[tuple[int, int]]:
    """Blocks of at most `block` columns, in none of which a group begins that does not end there.

    So all repairs of a group's columns are done when it is chosen. A group longer than a block begins with one.
    """
    blocks, start = [], cuts[0].start
    for cut in cuts:
        if cut.stop - start > block and cut.start > start:
            blocks.append((start, cut.start))
            start = cut.start
        while cut.stop - start > block:
            blocks.append((start, start + block))
            start += block
    return [*blocks, (start, cuts[-1].stop)]
