"""The sweep that prunes and rounds: SparseGPT's (arXiv 2301.00774, algorithm 1, section 3.5) with GPTQ's rounding
(Frantar et al. 2022, arXiv 2210.17323) in it.

Column by column a weight is set to 0 or to its nearest value on the grid, and the error, of pruning or rounding, is
compensated in the columns that follow, by the inverse of the input's Gram matrix. With every weight kept it is GPTQ,
without a grid it is the sweep of update=obs.

Shapes: O outputs, I inputs, G groups of a row that share a scale, C columns of a group. Columns are in group order.
Polarity: True in `keep` means that the weight is kept, in `whole` that it is not rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esparse.quantise import Scales

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from esparse.patterns import Pattern
    from esparse.quantise.grids import Grid

    Prune = Callable[..., tuple[Tensor, Tensor]]


def rounded(
    dense_OI: Tensor,
    start_OI: Tensor,
    upper_II: Tensor,
    grid: Grid,
    pattern: Pattern,
    fixed_OI: Tensor | None,
    *,
    block: int,
    prune: Prune,
) -> tuple[Tensor, Tensor, Scales]:
    """The result of `sweep` on `start_OI`, or of rounding after pruning for rows whose output is then nearer to dense.

    No row's error is then above that of rounding after pruning on the same mask. A sweep alone does not guarantee
    that: it is greedy, and if rounding costs little, its repairs may do harm.
    """
    import torch

    weight_OI, keep_OI, scales = sweep(start_OI, upper_II, grid, pattern, fixed_OI, block=block, prune=prune)
    pruned_OI, _ = prune(start_OI, upper_II, pattern, keep_OI, block=block)
    nearest_OI, others = grid.nearest(pruned_OI, keep_OI, pattern)
    worse_O1 = (_errors(dense_OI - nearest_OI, upper_II) < _errors(dense_OI - weight_OI, upper_II))[:, None]

    def of_both(swept: Tensor | None, nearest: Tensor | None) -> Tensor | None:
        return None if swept is None or nearest is None else torch.where(worse_O1, nearest, swept)

    scale_OG = torch.where(worse_O1, others.scale_OG, scales.scale_OG)
    zero_OG, whole_OI = of_both(scales.zero_OG, others.zero_OG), of_both(scales.whole_OI, others.whole_OI)
    return torch.where(worse_O1, nearest_OI, weight_OI), keep_OI, Scales(scale_OG, zero_OG, whole_OI)


def _errors(lost_OI: Tensor, upper_II: Tensor) -> Tensor:
    """d H d^T of each row, where U^T U = H^-1."""
    import torch

    return torch.linalg.solve_triangular(upper_II, lost_OI, upper=True, left=False).square().sum(1)


def sweep(
    weight_OI: Tensor,
    upper_II: Tensor,
    grid: Grid,
    pattern: Pattern,
    fixed_OI: Tensor | None,
    *,
    block: int,
    prune: Prune,
) -> tuple[Tensor, Tensor, Scales]:
    """The rounded weights, their keep mask and their scales.

    `upper_II` is U with U^T U = H^-1, `prune` the sweep without a grid (updates/obs.py). If `fixed_OI` is None, each
    group of the pattern is chosen as there. A scale is fitted when the sweep reaches its group, to the group's values
    after pruning alone: kept weights compensate their pruned neighbours, and a scale for the values before would clip
    them.
    """
    import torch

    from esparse.quantise.grids import half

    weight_IO, diagonal_I = weight_OI.T.clone(memory_format=torch.contiguous_format), upper_II.diagonal()
    inputs, columns = len(weight_IO), grid.columns(len(weight_IO))
    cuts = pattern.sweep_cuts(inputs, block) if fixed_OI is None else [slice(0, inputs)]
    by_start = {cut.start: cut for cut in cuts}
    keep_IO = torch.zeros_like(weight_IO, dtype=torch.bool) if fixed_OI is None else fixed_OI.T.contiguous()
    whole_OI = None if fixed_OI is None else grid.whole(weight_OI, fixed_OI, pattern)
    whole_IO = None if whole_OI is None else whole_OI.T.contiguous()
    groups = [slice(start, start + columns) for start in range(0, inputs, columns)]
    scales: list[Tensor] = []
    zeros: list[Tensor | None] = []
    chosen = 0 if fixed_OI is None else inputs
    errors_IO = torch.empty_like(weight_IO)

    def ahead(group: slice) -> Tensor:
        """The group's columns (O x C) after pruning without rounding; values that do not count are 0."""
        group_OC, upper_CC = weight_IO[group].T.contiguous(), upper_II[group, group].contiguous()
        if group.stop <= chosen:
            fixed_OC = keep_IO[group].T.contiguous()
        elif group.start == chosen and any(cut.stop == group.stop for cut in cuts):
            fixed_OC = None
        else:
            end = next(cut.stop for cut in cuts if cut.stop >= group.stop)
            rest_OI = pattern.keep_of_sweep((weight_IO[chosen:end] / diagonal_I[chosen:end, None]).square().T)
            fixed_OC = torch.cat([keep_IO[group.start : chosen].T, rest_OI], 1)[:, : group.stop - group.start]
        pruned_OC, keep_OC = prune(group_OC, upper_CC, pattern, fixed_OC, block=block)
        if whole_IO is not None and group.stop <= chosen:
            return pruned_OC.masked_fill(whole_IO[group].T, 0.0)
        whole_OC = grid.whole(pruned_OC, keep_OC, pattern)
        return pruned_OC if whole_OC is None else pruned_OC.masked_fill(whole_OC, 0.0)

    def fit(group: slice) -> None:
        scale_O, zero_O = grid.fit(ahead(group))
        scales.append(scale_O)
        zeros.append(zero_O)

    for start, end in spans([*cuts, *groups], inputs, block):
        for column in range(start, end):
            group = groups[column // columns]
            cut = by_start.get(column) if fixed_OI is None else None
            if column == group.start and (cut is None or cut.stop < group.stop):
                fit(group)
            if cut is not None:
                keep_IO[cut] = pattern.keep_of_sweep((weight_IO[cut] / diagonal_I[cut, None]).square().T).T
                chosen = cut.stop
                whole_OC = grid.whole(weight_IO[cut].T, keep_IO[cut].T, pattern)
                if whole_OC is not None:
                    whole_IO = torch.zeros_like(keep_IO) if whole_IO is None else whole_IO
                    whole_IO[cut] = whole_OC.T
                if column == group.start and cut.stop >= group.stop:
                    fit(group)
            scale_O, zero_O = scales[-1], zeros[-1]
            value_O = weight_IO[column]
            rounded_O = grid.rounded(value_O, scale_O, zero_O)
            if whole_IO is not None:
                rounded_O = torch.where(whole_IO[column], half(value_O), rounded_O)
            rounded_O = rounded_O * keep_IO[column]
            torch.div(value_O - rounded_O, diagonal_I[column], out=errors_IO[column])
            weight_IO[column] = rounded_O
            weight_IO[column + 1 : end].addr_(upper_II[column, column + 1 : end], errors_IO[column], alpha=-1)
        weight_IO[end:].addmm_(upper_II[start:end, end:].T, errors_IO[start:end], alpha=-1)
    zero_OG = torch.stack([zero for zero in zeros if zero is not None], 1) if zeros[0] is not None else None
    whole_OI = None if whole_IO is None else whole_IO.T.contiguous()
    return weight_IO.T.contiguous(), keep_IO.T.contiguous(), Scales(torch.stack(scales, 1), zero_OG, whole_OI)


def spans(cuts: list[slice], inputs: int, block: int) -> list[tuple[int, int]]:
    """Blocks of at most `block` columns, such that no cut straddles a block boundary.

    All repairs of a cut's columns are then done when it is reached. A cut longer than a block starts at a block's
    start.
    """
    found, start = [], 0
    while start < inputs:
        end = min(start + block, inputs)
        while beyond := [cut.start for cut in cuts if start < cut.start < end < cut.stop]:
            end = min(beyond)
        found.append((start, end))
        start = end
    return found
