"""Quantisation within pruning: decides when kept values are rounded, and stores the grids' parameters.

A recovery that changes values of a layer comes between the update and the rounding; obs and sparsegpt then prune in a
separate sweep.

Shapes: O outputs, I inputs, E experts, G groups of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from esparse.models.matrices import BlockMatrices
from esparse.quantise import Scales
from esparse.quantise.grids import Grid
from esparse.records import audit
from esparse.recoveries import Recovery
from esparse.updates import Layer, Solution, obs

if TYPE_CHECKING:
    from esparse.models.blocks import BlockModel
    from esparse.models.matrices import Matrix
    from esparse.pruning.method import Method

log = logging.getLogger("esparse")

FEW = 0.01  # of the scales


def check_widths(blocks: BlockModel, method: Method, skip: Iterable[str] = ()) -> None:
    """Raises Mistake if a layer cannot be quantised as asked; for experts that is known only when they are used."""

    def widths() -> Iterator[tuple[str, int]]:
        for index, block in enumerate(blocks.blocks):
            layers = BlockMatrices(block, blocks.name(index), [*skip, *blocks.stay_dense]).layers()
            yield from ((matrix.name, matrix.view().shape[1]) for matrix in layers)

    method.quantise.ready(widths())


def joint_grid(method: Method) -> Grid | None:
    """The grid if the update may round while it sweeps; else None."""
    grid = method.quantise
    recovers = type(method.recovery).layer is not Recovery.layer
    return grid if isinstance(grid, Grid) and grid.rounding == "sweep" and not recovers else None


def rounded(method: Method, layer: Layer, solution: Solution, name: str) -> Solution:
    """The solution with its kept values on the grid: by a last sweep on the fixed mask, or each by itself."""
    grid = method.quantise
    if not isinstance(grid, Grid):
        return solution
    if solution.scales is None:
        grid.ready([(name, solution.weight_OI.shape[1])])
        solution = _on_grid(grid, layer, solution)
    assert solution.scales is not None
    large, small = grid.beyond(solution.scales.scale_OG)
    if large or small > FEW * solution.scales.scale_OG.numel():  # a few groups of next to nothing add next to nothing
        log.warning(
            "%s: %d of %d scales are too %s for %s, so that its values are not the nearest: use quantise.scale=%s",
            name,
            large or small,
            solution.scales.scale_OG.numel(),
            "large" if large else "small",
            grid.scale,
            "bfloat16" if grid.scale == "float16" else "float32",
        )
    return solution


def _on_grid(grid: Grid, layer: Layer, solution: Solution) -> Solution:
    if grid.rounding == "sweep" and layer.stats.tokens:
        return obs.swept(layer, solution, grid)
    grouping = layer.grouping
    weight_OI, keep_OI = grouping.ordered(solution.weight_OI), grouping.ordered(solution.keep_OI)
    weight_OI, scales = grid.nearest(weight_OI, keep_OI, grouping.pattern)
    return replace(solution, weight_OI=grouping.restored(weight_OI), scales=scales)


def remember(grids: dict[str, Tensor], matrix: Matrix, scales: Scales | None) -> None:
    """Adds a matrix's parameters: `scale/NAME`, `zero/NAME`, `whole/NAME` (bits), experts as first dimension."""
    if scales is None:
        return
    parts = {"scale": scales.scale_OG, "zero": scales.zero_OG}
    parts["whole"] = None if scales.whole_OI is None else audit.pack(scales.whole_OI)
    for what, value in parts.items():
        if value is None:
            continue
        name, value = f"{what}/{matrix.entry}", value.cpu()
        if matrix.expert is None:
            grids[name] = value
        else:
            grids.setdefault(name, value.new_zeros(matrix.experts, *value.shape))[matrix.expert] = value


def scales_of(grids: dict[str, Tensor], matrix: Matrix) -> Scales | None:
    """The parameters that `remember` stored of a matrix; None if it is not quantised."""
    found = {}
    for what in ("scale", "zero", "whole"):
        value = grids.get(f"{what}/{matrix.entry}")
        found[what] = value if value is None or matrix.expert is None else value[matrix.expert]
    if found["scale"] is None:
        return None
    whole, shape = found["whole"], list(matrix.view().shape)
    return Scales(found["scale"], found["zero"], None if whole is None else audit.unpack(whole, shape))
