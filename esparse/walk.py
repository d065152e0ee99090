"""The one loop over a model's blocks: whoever wants to look at all of them, or to change them, is a visitor here.

Shapes: S sequences, L tokens of a sequence, T tokens, I inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esparse import gradients
from esparse.method import Method
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.matrices import InputGroup, Matrix
from esparse.report import Stages
from esparse.stats import Factory, Gram, LayerStats, Statistic, WeightGradient

log = logging.getLogger("esparse")


@dataclass(slots=True, eq=False)
class Group:
    """An input group of one block, what its tokens summed up to, and the gradients of its weights, where asked for."""

    group: InputGroup
    statistics: dict[str, Statistic]
    gradients: Mapping[str, Tensor]

    def stats(self, matrix: Matrix) -> LayerStats:
        extra = {}
        if matrix.entry in self.gradients:
            extra["gradient"] = WeightGradient(matrix.part_of(self.gradients[matrix.entry]))
        return LayerStats(matrix.name, self.statistics | extra, self.statistics["norm"].tokens)


@dataclass(slots=True)
class Walk:
    """The loop through the blocks of a model."""

    blocks: BlockModel
    tokens_SL: Tensor
    skip: Sequence[str]
    stages: Stages
    of_model: Mapping[str, Tensor] = field(default_factory=dict)  # gradients, where the metric wants the whole model's

    def __call__(
        self,
        method: Method,
        collects: dict[str, Factory],
        visit: Callable[[Block, list[Group]], None],
        *,
        changes: bool,
    ) -> None:
        """Shows every block, prepared, with what its inputs summed up to, and passes on what it returns afterwards.

        `changes` says whether the blocks are to be kept as the preparation and the visitor leave them.
        """
        blocks, stages = self.blocks, self.stages
        with stages("calibrate"):
            activations = Activations(blocks, self.tokens_SL, method.sequences_at_once())
            dense = activations.twin() if method.recovery.needs_dense_stream() else None
        for index in range(len(blocks.blocks)):
            last = index + 1 == len(blocks.blocks)
            with blocks.resident(index, changed=changes):
                block = Block(index, activations, dense, self.skip, method.seed)
                with stages("prepare"):
                    method.prepare.block(block)
                with stages("calibrate"):
                    of_block = gradients.of_block(block) if method.metric.gradients() == "block" else self.of_model
                    groups = _observe(block, collects, of_block, sequences=len(self.tokens_SL))
                    ahead = None if dense is None or last else dense.advanced(index)
                visit(block, groups)
                with stages("calibrate"):
                    if not last:
                        activations.advance(index)
                    if dense is not None and ahead is not None:
                        dense.hidden = ahead


def _observe(
    block: Block, collects: dict[str, Factory], weight_gradients: Mapping[str, Tensor], *, sequences: int
) -> list[Group]:
    """The input groups of one block, each with what its tokens summed up to."""
    activations, device = block.activations, block.activations.blocks.device
    matrices = block.matrices()
    statistics: dict[int, dict[str, Statistic]] = {}

    def statistics_of(group: InputGroup) -> dict[str, Statistic]:
        if id(group) not in statistics:
            size: dict[str, Any] = {"inputs": group.inputs, "sequences": sequences, "device": device}
            statistics[id(group)] = {name: build(**size) for name, build in collects.items()}
        return statistics[id(group)]

    look, looks = 0, 1
    while look < looks:

        def read(group: InputGroup, x_TI: Tensor, look: int = look) -> None:
            for statistic in statistics_of(group).values():
                statistic.add(x_TI, look)

        with matrices.observed(read):
            activations.observe(block.index)
        looks = max([s.looks for of_group in statistics.values() for s in of_group.values()], default=1)
        look += 1
    for name in matrices.complete():
        log.warning("%s took no part in the forward pass and stays dense", name)
    for group in matrices.groups:
        gram = statistics_of(group).get("gram")
        if isinstance(gram, Gram) and not torch.isfinite(gram.gram_II).all():
            raise ValueError(
                f"the Gram matrix of the inputs of {group.matrices[0].name} holds NaN or Inf: try model.dtype=bfloat16 "
                "or float32, otherwise the model's weights are damaged"
            )
    return [Group(group, statistics_of(group), weight_gradients) for group in matrices.groups]
