"""Weight equalisation: moves part of the differences in scale between input channels from the input to the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.prepare import Prepare

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.models.block import Block
    from esparse.models.matrices import InputGroup
    from esparse.models.producers import Edge
    from esparse.stats import ColumnMax

log = logging.getLogger("esparse")

LIMIT = 1e3  # scales are limited to 1/LIMIT ... LIMIT, so that weights stay within the range of half precision


@dataclass(kw_only=True, slots=True)
class Equalise(Prepare):
    """SmoothQuant's scales (arXiv 2211.10438, eq. 4), the first step of the 8:16 paper (arXiv 2507.03052).

    The columns of all layers that read one tensor are multiplied by max|X_j|^power / max|W_j|^(1 - power), and the
    tensor's producer is divided by it. Layers without a known producer are not changed, and the log says so.
    """

    # 0 looks at the weights alone, 1 at the inputs alone
    power: float  # a column is multiplied by max|X|^power / max|W|^(1 - power)

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise Mistake(f"prepare.power must lie between 0 and 1, got {self.power}")

    def block(self, block: Block) -> None:
        from esparse.models.graph import BlockGraph
        from esparse.stats import ColumnMax

        graph = BlockGraph(block)
        largest: dict[InputGroup, ColumnMax] = {}

        def read(group: InputGroup, x_TI: Tensor) -> None:
            if group not in largest:
                largest[group] = ColumnMax(inputs=group.inputs, sequences=1, device=x_TI.device)
            largest[group].add(x_TI, 0)

        graph.watch(read)
        edges, left = graph.edges()
        pruned = set(block.matrices().parameters())

        def divide(edge: Edge) -> None:
            if (scale_I := self._scale_I(edge, largest, pruned)) is not None:
                edge.move(scale_I)

        # From the block's end on, so that a matrix's rows are divided before its columns are measured.
        for together in edges:
            if not graph.changed(together, divide):
                left += [group for edge in together for group in edge.groups]
        names = {m.entry.removesuffix(".weight"): None for group in left for m in group.matrices if m.entry in pruned}
        if names:
            log.warning("not equalised, since nothing before them can absorb it: %s", ", ".join(names))

    def _scale_I(self, edge: Edge, largest: Mapping[InputGroup, ColumnMax], pruned: set[str]) -> Tensor | None:
        """The factors of an edge's columns; None if no token reached it or none of its readers is pruned."""
        import torch

        weights = [m.view().abs().amax(dim=0).float() for g in edge.groups for m in g.matrices if m.entry in pruned]
        inputs = [largest[group].max_I for group in edge.groups if group in largest]
        if not weights or not inputs:
            return None
        input_max_I, weight_max_I = (torch.stack(maxima).amax(dim=0) for maxima in (inputs, weights))
        return scale_I(edge.producer.tied(input_max_I), edge.producer.tied(weight_max_I), self.power)


def scale_I(input_max_I: Tensor, weight_max_I: Tensor, power: float) -> Tensor:
    """max|X_j|^power / max|W_j|^(1 - power), within LIMIT; 1 for a channel that is always 0 or has no weights."""
    ratio_I = input_max_I.pow(power) / weight_max_I.pow(1 - power)
    unused_I = (input_max_I == 0) | (weight_max_I == 0)
    return ratio_I.clamp(1 / LIMIT, LIMIT).masked_fill(unused_I, 1.0)
