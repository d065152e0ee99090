"""The loop over a model's blocks: a visitor gets every block with its observed inputs, and may change it.

Shapes: S sequences, L tokens of a sequence, T tokens, I inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from esparse.errors import Mistake
from esparse.linalg import all_finite
from esparse.models import host_memory
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.matrices import BlockMatrices, InputGroup, Matrix, Reader
from esparse.pruning import gradients
from esparse.pruning.input_cache import InputCache, budget
from esparse.pruning.journal import Entry, Journal
from esparse.pruning.method import Method
from esparse.records.report import Stages
from esparse.stats import CrossGram, Factory, Gram, LayerStats, Statistic, WeightGradient

log = logging.getLogger("esparse")


@dataclass(slots=True, eq=False)
class Observed:
    """An input group of one block, the statistics of its input, and the gradients of its weights (if asked for)."""

    inputs: InputGroup
    statistics: dict[str, Statistic]
    gradients: Mapping[str, Tensor]

    def stats(self, matrix: Matrix) -> LayerStats:
        extra = {}
        if matrix.entry in self.gradients:
            extra["gradient"] = WeightGradient(matrix.part_of(self.gradients[matrix.entry]))
        return LayerStats(matrix.name, self.statistics | extra, self.statistics["norm"].tokens)


@dataclass(slots=True)
class BlockLoop:
    """Runs the blocks of a model one after the other and calls a visitor for each."""

    blocks: BlockModel
    tokens_SL: Tensor
    skip: Sequence[str]
    stages: Stages
    of_model: Mapping[str, Tensor] = field(default_factory=dict)  # gradients, if the metric needs the whole model's
    _cannot_save: bool = False

    def __call__(
        self,
        method: Method,
        collects: dict[str, Factory],
        visit: Callable[[Block, list[Observed]], Entry | None],
        *,
        changes: str | None,
        journal: Journal | None = None,
    ) -> None:
        """Calls `visit` with every prepared block and its observed inputs, then passes its outputs to the next block.

        `changes`: first part of the names of the files for changed blocks; None: changes are not stored. With a
        journal, the loop starts after the journal's last block, and writes the visitor's entries into it.
        """
        blocks, ranks, stages = self.blocks, self.blocks.ranks, self.stages
        done = journal.finished if journal else 0
        if done == len(blocks.blocks):  # all blocks are done; only the steps after the loop are left
            self._adopt(range(done), journal)
            return
        with stages("calibrate"):
            streams = {"pruned": Activations(blocks, ranks.share(self.tokens_SL), method.sequences_at_once())}
            if method.needs_dense_stream():
                streams["dense"] = streams["pruned"].twin()
            first = self._restored(streams, journal)
        activations, dense = streams["pruned"], streams.get("dense")
        for index in range(first, len(blocks.blocks)):
            block = Block(index, activations, dense, self.skip, method.seed)
            if index < done:
                self._pass_on(block, method, journal)
                continue
            last = index + 1 == len(blocks.blocks)
            with blocks.resident(index, changed=changes):
                with stages("prepare"):
                    method.prepare.block(block)
                with stages("calibrate"):
                    of_block = gradients.of_block(block) if method.metric.gradients() == "block" else self.of_model
                    groups = _observe(block, collects, of_block, self.tokens_SL.shape)
                    ahead = None if dense is None or last else dense.advanced(index)
                entry = visit(block, groups)
                with stages("calibrate"):
                    if changes is not None:
                        # All ranks computed the same, but their devices may round differently. The first rank's block
                        # is written to disk, so all hidden states must come from it.
                        ranks.copy_from_first(block.module.parameters())
                    if not last:
                        activations.advance(index)
                    if dense is not None and ahead is not None:
                        dense.go_on(ahead)
            if blocks.device.type == "cpu":
                host_memory.trim()  # what a block took in between would stay with the process
            if journal is not None and entry is not None:
                journal.write(index, entry, stages)
                if not last and ranks.size == 1:  # with several ranks, each has only its share
                    self._snapshot(index + 1, streams, journal)

    def _snapshot(self, index: int, streams: Mapping[str, Activations], journal: Journal) -> None:
        """Writes a snapshot of the hidden states in front of a block, if one is due and they can be saved."""
        if not journal.snapshot_due():
            return
        saved = {name: stream.saved() for name, stream in streams.items()}
        whole = {name: tensors for name, tensors in saved.items() if tensors is not None}
        if len(whole) == len(saved):
            journal.snapshot(index, whole)
        elif not self._cannot_save:
            self._cannot_save = True
            log.warning("the values that flow between the blocks cannot be saved: a resumed run computes them anew")

    def _restored(self, streams: Mapping[str, Activations], journal: Journal | None) -> int:
        """Loads the hidden states that an earlier attempt saved; returns the index of the block that they enter."""
        first = 0 if journal is None else journal.snapshot_before()
        if journal is None or not first or self.blocks.ranks.size > 1:
            return 0
        if not all([stream.restore(journal.hidden(name)) for name, stream in streams.items()]):  # noqa: C419, all of them
            return 0  # with another model.batch_tokens the micro-batches differ
        self._adopt(range(first), journal)
        return first

    def _pass_on(self, block: Block, method: Method, journal: Journal | None) -> None:
        """Advances the hidden states through a block that an earlier attempt finished."""
        ahead = None
        if block.dense is not None:
            with self.blocks.resident(block.index):
                with self.stages("prepare"):
                    method.prepare.block(block)
                with self.stages("calibrate"):
                    ahead = block.dense.advanced(block.index)
        self._adopt([block.index], journal)
        with self.stages("calibrate"), self.blocks.resident(block.index):
            block.activations.advance(block.index)
        if block.dense is not None and ahead is not None:
            block.dense.go_on(ahead)

    def _adopt(self, indices: Iterable[int], journal: Journal | None) -> None:
        assert journal is not None
        for index in indices:
            self.blocks.adopt(index, journal.weights(index))


def _observe(
    block: Block, collects: dict[str, Factory], weight_gradients: Mapping[str, Tensor], shape_SL: tuple[int, ...]
) -> list[Observed]:
    """The input groups of one block, each with its statistics over all ranks' tokens.

    `shape_SL`: shape of the calibration tokens of all ranks.
    """
    activations, device, ranks = block.activations, block.activations.blocks.device, block.activations.blocks.ranks
    matrices = block.matrices()
    sequences, length = shape_SL
    size: dict[str, Any] = {"sequences": sequences, "device": device, "before": ranks.before(sequences) * length}
    statistics: dict[InputGroup, dict[str, Statistic]] = {}

    def statistics_of(group: InputGroup) -> dict[str, Statistic]:
        if group not in statistics:
            statistics[group] = {name: build(inputs=group.inputs, **size) for name, build in collects.items()}
        return statistics[group]

    def unite(pass_index: int) -> None:
        united = [statistic for group in matrices.groups for statistic in statistics_of(group).values()]
        counts = ranks.gather([statistic.tokens for statistic in united])  # at once, as there may be many experts
        for statistic, *tokens in zip(united, *counts, strict=True):
            statistic.unite(ranks, pass_index, tokens)

    cache = InputCache(0)

    def begin() -> Reader:
        nonlocal cache
        statistics.clear()
        cache = InputCache(budget(activations))
        return read

    def run() -> None:
        for batch in range(len(activations.hidden)):
            cache.begin(batch)
            activations.run(block.index, batch)

    def read(group: InputGroup, x_TI: Tensor) -> None:
        for statistic in statistics_of(group).values():
            statistic.add(x_TI, 0)
            if statistic.passes > 1:
                cache.add(x_TI, statistic)

    def read_again(group: InputGroup, x_TI: Tensor) -> None:
        for statistic in statistics_of(group).values():
            if statistic.passes > 1:
                statistic.add(x_TI, 1)

    matrices.watch(begin, run)
    replaced = matrices.unite(ranks.gather(matrices.members()))
    for group, own in zip(matrices.groups, replaced, strict=True):
        if own:  # of groups that were united into one, some may have seen no tokens
            statistics[group] = max((statistics_of(g) for g in own), key=lambda of_group: of_group["norm"].tokens)
    if "cross" in collects and block.dense is not None:
        _add_pairs(block, matrices, lambda group: statistics_of(group)["cross"])
    unite(0)
    if any(statistic.passes > 1 for group in matrices.groups for statistic in statistics_of(group).values()):
        held, inputs = cache.take()
        for statistic in list(inputs):
            statistic.add_all(inputs.pop(statistic), 1)
        again = [batch for batch in range(len(activations.hidden)) if batch not in held]
        if again:  # memory was short, so these inputs are computed once more
            with matrices.observed(read_again):
                for batch in again:
                    activations.run(block.index, batch)
        unite(1)
    for name in matrices.complete():
        log.warning("%s was not used in the forward pass and stays dense", name)
    for group in matrices.groups:
        gram = statistics_of(group).get("gram")
        if isinstance(gram, Gram) and not all_finite(gram.gram_II):
            raise Mistake(
                f"the Gram matrix of the inputs of {group.matrices[0].name} holds NaN or Inf: try model.dtype=bfloat16 "
                "or float32, otherwise the model's weights are damaged"
            )
    return [Observed(group, statistics_of(group), weight_gradients) for group in matrices.groups]


def _add_pairs(block: Block, matrices: BlockMatrices, cross: Callable[[InputGroup], Statistic]) -> None:
    """Shows each group's `cross` the inputs that tokens have in both streams, one micro-batch after the other."""
    assert block.dense is not None
    for batch, hidden_BLH in enumerate(block.activations.hidden):
        all_tokens = hidden_BLH.shape[0] * hidden_BLH.shape[1]
        of_dense: dict[InputGroup, Tensor] = {}

        def read_dense(group: InputGroup, x_TI: Tensor) -> None:
            of_dense[group] = x_TI.clone()  # noqa: B023

        def read(group: InputGroup, x_TI: Tensor) -> None:
            dense_TI = of_dense.get(group)  # noqa: B023
            # What is sent to an expert may be other tokens in each stream.
            if dense_TI is not None and len(x_TI) == len(dense_TI) == all_tokens:  # noqa: B023
                statistic = cross(group)
                assert isinstance(statistic, CrossGram)
                statistic.add_pair(x_TI, dense_TI)

        with matrices.observed(read_dense):
            block.dense.run(block.index, batch)
        with matrices.observed(read):
            block.activations.run(block.index, batch)
