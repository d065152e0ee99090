"""SparseGPT's column sweep (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

Column by column, the error of the pruned weights is compensated in the columns that follow, by the inverse of the
input's Gram matrix (the "Hessian"). Shapes: O outputs, I inputs. Polarity: True in `keep` means the weight is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.parts import bounds
from esparse.patterns import Rows
from esparse.updates import Layer, Solution, Update

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.patterns import NM, Pattern
    from esparse.quantise.grids import Grid
    from esparse.stats import Factory

MASKS = ("start", "own")
INNER = 16  # columns of a block inside a block
ROWS = 256  # that one core sweeps at a time


@dataclass(kw_only=True, slots=True)
class Obs(Update):
    """The sweep, on a given mask or on one that it chooses group by group."""

    mask: str  # start (as the metric, or the update before, chose it) | own (chosen from the repaired weights)
    # It grows if the matrix is singular, and the log says so
    damp: float  # added to the Gram matrix's diagonal, as a share of its mean
    block: int  # columns that repair all later columns in one product

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise Mistake(f"update.mask must be one of {', '.join(MASKS)}, got {self.mask!r}")
        bounds.check("update", self, positive=("damp", "block"))

    def collects(self) -> dict[str, Factory]:
        from esparse.stats import Gram

        return {"gram": Gram}

    def is_idle(self, pattern: Pattern) -> bool:
        return self.mask == "start" and isinstance(pattern, Rows)  # no row has a pruned weight beside a kept one

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

    def apply_rounding(self, layer: Layer, start: Solution, grid: Grid) -> Solution:
        """Columns are pruned, then rounded, and the errors of both passed on."""
        from esparse.updates import column_sweep

        grouping = layer.grouping
        dense_OI = grouping.ordered(layer.dense_OI)
        weight_OI, keep_OI, scales = column_sweep.rounded(
            dense_OI,
            dense_OI,
            layer.stats["gram"].inverse_factor(grouping.order_I, self.damp),
            grid,
            grouping.pattern,
            grouping.ordered(start.keep_OI) if self.mask == "start" else None,
            block=self.block,
            prune=sweep,
        )
        return Solution(grouping.restored(weight_OI), grouping.restored(keep_OI), scales=scales)


def swept(layer: Layer, solution: Solution, grid: Grid) -> Solution:
    """The solution with its kept values rounded on its mask; `layer.dense_OI`: what rows are to be near to."""
    from esparse.updates import column_sweep

    grouping = layer.grouping
    grid.ready([(layer.stats.name, solution.weight_OI.shape[1])])
    weight_OI, _, scales = column_sweep.rounded(
        grouping.ordered(layer.dense_OI),
        grouping.ordered(solution.weight_OI),
        layer.stats["gram"].inverse_factor(grouping.order_I, grid.damp),
        grid,
        grouping.pattern,
        grouping.ordered(solution.keep_OI),
        block=grid.block,
        prune=sweep,
    )
    return replace(solution, weight_OI=grouping.restored(weight_OI), scales=scales)


def sweep(
    dense_OI: Tensor, upper_II: Tensor, pattern: Pattern, fixed_OI: Tensor | None, *, block: int
) -> tuple[Tensor, Tensor]:
    """The repaired weights and their keep mask, with columns in group order.

    `upper_II` is U with U^T U = H^-1. If `fixed_OI` is None, each group of the pattern is chosen when the sweep reaches
    it, by w^2 / U_jj^2 of the repaired weights; of a pattern in per cent, that share of each block of columns over all
    rows, as in the authors' code.
    """
    import torch

    from esparse import kernels

    is_single = dense_OI.dtype == torch.float32
    loops = kernels.loops("columns") if is_single and dense_OI.device.type == "cpu" else None
    repair = kernels.triton("repair", dense_OI.device) if is_single else None
    chosen = pattern.parts() if fixed_OI is None else ()
    nm = chosen[0] if chosen else None
    # Both choose n of m alone, and within a block.
    if fixed_OI is not None or (nm is not None and len(chosen) == 1 and nm.m <= block):
        if loops is not None:
            return _sweep_rows(loops, dense_OI, upper_II, nm, fixed_OI, block)
        if repair is not None and (nm is None or nm.m <= repair.WIDEST):
            return _sweep_blocks(repair, dense_OI, upper_II, nm, fixed_OI, min(block, repair.WIDEST))
    return _sweep_columns(dense_OI, upper_II, pattern, fixed_OI, block)


def _sweep_columns(
    dense_OI: Tensor, upper_II: Tensor, pattern: Pattern, fixed_OI: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Sweeps column after column, all rows at once."""
    import torch

    # Transposed, so that a column is contiguous, and copied, since weights as GPT-2 stores them lie transposed already.
    weight_IO = dense_OI.T.clone(memory_format=torch.contiguous_format)
    inputs = len(weight_IO)
    if fixed_OI is None:
        keep_IO, cuts = torch.ones_like(weight_IO, dtype=torch.bool), pattern.sweep_cuts(inputs, block)
    else:
        keep_IO, cuts = fixed_OI.T.contiguous(), [slice(0, inputs)]
    groups = {cut.start: cut for cut in cuts} if fixed_OI is None else {}
    diagonal_I = upper_II.diagonal()
    errors_IO = torch.empty_like(weight_IO)

    def advance(start: int, end: int, sizes: tuple[int, ...]) -> None:
        """Prunes the columns from `start` to before `end`, and repairs columns before `end`."""
        if sizes:
            for first, last in _blocks(_clipped(cuts, start, end), sizes[0]):
                advance(first, last, sizes[1:])
                weight_IO[last:end].addmm_(upper_II[first:last, last:end].T, errors_IO[first:last], alpha=-1)
            return
        # Cuts all views at once: with few rows, cutting them one by one takes longer than the arithmetic.
        weights, keeps, errors, diagonal = (
            whole[start:end].unbind() for whole in (weight_IO, keep_IO, errors_IO, diagonal_I)
        )
        for column, (weight_O, keep_O, error_O, pivot) in enumerate(
            zip(weights, keeps, errors, diagonal, strict=True), start
        ):
            if column in groups:
                cut = groups[column]
                keep_IO[cut] = pattern.keep_of_sweep((weight_IO[cut] / diagonal_I[cut, None]).square().T).T
            torch.div(weight_O, pivot, out=error_O).masked_fill_(keep_O, 0.0)
            weight_IO[column:end].addr_(upper_II[column, column:end], error_O, alpha=-1)

    # Blocks inside blocks, so that columns repaired one by one stay in the cache.
    advance(0, inputs, (block, INNER) if block > INNER else (block,))
    weight_IO.masked_fill_(~keep_IO, 0.0)
    return weight_IO.T.contiguous(), keep_IO.T.contiguous()


def _sweep_blocks(
    repair: Any, dense_OI: Tensor, upper_II: Tensor, chosen: NM | None, fixed_OI: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Sweeps block after block of columns, all rows at once, on a GPU."""
    import torch

    inputs = dense_OI.shape[1]
    weight_OI = dense_OI.clone(memory_format=torch.contiguous_format)
    keep_OI = torch.empty_like(weight_OI, dtype=torch.bool) if fixed_OI is None else fixed_OI.contiguous()
    cuts, sizes = _own_groups(chosen, inputs)
    for start, end in _blocks(cuts, block):
        errors_OB = repair.sweep_block(weight_OI, keep_OI, upper_II, start, end, *sizes)
        weight_OI[:, end:].addmm_(errors_OB, upper_II[start:end, end:], alpha=-1)
    return weight_OI, keep_OI


def _own_groups(chosen: NM | None, inputs: int) -> tuple[list[slice], tuple[int, int, int]]:
    """The column ranges of groups to choose, their m, n and the n of a shorter last group; zeros for a fixed mask."""
    if chosen is None:
        return [slice(0, inputs)], (0, 0, 0)
    return chosen.cuts(inputs), (chosen.m, chosen.n, chosen.kept_per_row(inputs % chosen.m))


def _sweep_rows(
    loops: Any, dense_OI: Tensor, upper_II: Tensor, chosen: NM | None, fixed_OI: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Sweeps row after row; each core has its own rows."""
    import torch

    from esparse.parallel.cores import each_core

    outputs, inputs = dense_OI.shape
    weight_OI = dense_OI.clone(memory_format=torch.contiguous_format)
    keep_OI = torch.empty_like(weight_OI, dtype=torch.bool) if fixed_OI is None else fixed_OI.contiguous()
    cuts, sizes = _own_groups(chosen, inputs)
    blocks = _blocks(cuts, block)
    own = [upper_II[start:end, start:end].contiguous().numpy() for start, end in blocks]

    @torch.inference_mode()  # the mode belongs to a thread
    def rows(part: slice) -> None:
        weight_RI, keep_RI = weight_OI[part], keep_OI[part]
        errors_RB = weight_RI.new_empty(len(weight_RI), max(end - start for start, end in blocks))
        for (start, end), upper_BB in zip(blocks, own, strict=True):
            loops.sweep_rows(weight_RI.numpy(), keep_RI.numpy(), upper_BB, start, *sizes, errors_RB.numpy())
            weight_RI[:, end:].addmm_(errors_RB[:, : end - start], upper_II[start:end, end:], alpha=-1)
        weight_RI *= keep_RI

    with each_core() as pool:
        list(pool.map(rows, (slice(start, start + ROWS) for start in range(0, outputs, ROWS))))
    return weight_OI, keep_OI


def _clipped(cuts: list[slice], start: int, end: int) -> list[slice]:
    """The parts of the ranges between `start` and `end`."""
    inside = (slice(max(cut.start, start), min(cut.stop, end)) for cut in cuts)
    return [cut for cut in inside if cut.start < cut.stop]


def _blocks(cuts: list[slice], block: int) -> list[tuple[int, int]]:
    """Blocks of at most `block` columns, such that no group straddles a block boundary.

    All repairs of a group's columns are then done when it is chosen. A group longer than a block starts at a block's
    start.
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
