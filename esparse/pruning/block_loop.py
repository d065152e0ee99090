"""The loop over a model's blocks: a visitor gets every block with its observed inputs, and may change it.

Shapes: S sequences, L tokens of a sequence, T tokens, I inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from esparse.models import host_memory
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.pruning import gradients
from esparse.pruning.journal import Entry, Journal
from esparse.pruning.method import Method
from esparse.pruning.observation import Observation, Observed, in_turn
from esparse.records.report import Stages
from esparse.stats import Factory

log = logging.getLogger("esparse")


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
        visit: Callable[[Block, Iterable[Observed]], Entry | None],
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
                    observation = Observation(block, collects, of_block, self.tokens_SL.shape)
                    groups = observation.all()
                    ahead = None if dense is None or last else dense.advanced(index)
                entry = visit(block, self._in_turn(observation, groups) if method.sequential() else groups)
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

    def _in_turn(self, observation: Observation, groups: Sequence[Observed]) -> Iterator[Observed]:
        """The groups; each is observed again once those before it are pruned."""
        observation.keep_dense()
        for number, together in enumerate(in_turn(groups)):
            if number:
                with self.stages("calibrate"):
                    self.blocks.ranks.copy_from_first(observation.block.module.parameters())
                    observation.again(together)
            yield from together

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
