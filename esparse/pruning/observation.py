"""What is observed of one block's inputs: of all layers at once, or of some once more when others are pruned.

Shapes: S sequences, L tokens of a sequence, T tokens, I inputs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from esparse.errors import Mistake
from esparse.linalg import all_finite
from esparse.models import residual_stream
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.matrices import InputGroup, Matrix, Reader
from esparse.models.residual_stream import Behind
from esparse.pruning.input_cache import InputCache, budget
from esparse.stats import CrossGram, Factory, Gram, LayerStats, Statistic, StreamGram, WeightGradient

log = logging.getLogger("esparse")

# An expert's number in a list of experts. In other lists a layer may read what the one before it makes: CTRL's ffn.0
# and ffn.2 are the two matrices of one MLP.
_EXPERT = re.compile(r"(expert[^.]*)\.\d+(?=\.)")


class _Enough(Exception):
    """Ends a block's forward pass after the last wanted tensor was seen."""


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


def in_turn(groups: Sequence[Observed]) -> list[list[Observed]]:
    """The groups in the order of their use, those of a layer's experts together: no expert reads what another makes."""
    together: dict[str, list[Observed]] = {}
    for group in groups:
        together.setdefault(_EXPERT.sub(r"\1", group.inputs.matrices[0].entry), []).append(group)
    return list(together.values())


def _is_expert(matrix: Matrix) -> bool:
    return matrix.expert is not None or _EXPERT.search(matrix.entry) is not None


class Observation:
    """The input groups of one block, each with its statistics over all ranks' tokens."""

    def __init__(
        self,
        block: Block,
        collects: dict[str, Factory],
        weight_gradients: Mapping[str, Tensor],
        shape_SL: Sequence[int],
    ) -> None:
        """`shape_SL`: shape of the calibration tokens of all ranks."""
        self.block = block
        self.matrices = block.matrices()
        self._collects, self._gradients = collects, weight_gradients
        self._ranks, device = block.activations.blocks.ranks, block.activations.blocks.device
        sequences, length = shape_SL
        before = self._ranks.before(sequences) * length
        self._size: dict[str, Any] = {"sequences": sequences, "device": device, "before": before}
        self._statistics: dict[InputGroup, dict[str, Statistic]] = {}
        self._dense: list[tuple[nn.Parameter, Tensor]] = []
        self._behind: dict[InputGroup, Behind] = {}  # of groups whose one layer adds to the residual stream
        self._cache = InputCache(0)

    def all(self) -> list[Observed]:
        """Finds the groups and observes them all.

        Raises Mistake if a Gram matrix is NaN or Inf.
        """

        def begin() -> Reader:
            self._statistics.clear()
            self._cache = InputCache(budget(self.block.activations))
            return self._read

        def run() -> None:
            for batch in range(len(self.block.activations.hidden)):
                self._cache.begin(batch)
                self.block.activations.run(self.block.index, batch)

        matrices = self.matrices
        matrices.watch(begin, run)
        replaced = matrices.unite(self._ranks.gather(matrices.members()))
        for group, own in zip(matrices.groups, replaced, strict=True):
            if own:  # of groups that were united into one, some may have seen no tokens
                self._statistics[group] = max(map(self._of, own), key=lambda of_group: of_group["norm"].tokens)
        for batch in range(len(self.block.activations.hidden) if self._pairs() else 0):
            self._run(batch, matrices.groups, lambda group, x_TI: None)
        self._finish(matrices.groups)
        for name in matrices.complete():
            log.warning("%s was not used in the forward pass and stays dense", name)
        for group in matrices.groups:
            self._check(group)
        return [Observed(group, self._of(group), self._gradients) for group in matrices.groups]

    def keep_dense(self) -> None:
        """Copies the block's weights, which the dense stream has to pass when some of its layers are pruned."""
        self._dense = [(p, p.data.clone()) for p in self.block.module.parameters()] if self._pairs() else []
        if self._dense and "stream" in self._collects:
            self._behind = self._find_behind()

    def again(self, observed: Sequence[Observed]) -> None:
        """Observes these groups anew with the block's present weights, and replaces their statistics.

        The dense stream has the weights that `keep_dense` copied.
        Raises Mistake if a Gram matrix is NaN or Inf.
        """
        groups = [group.inputs for group in observed]
        for group in groups:
            self._statistics.pop(group, None)
        self._cache = InputCache(budget(self.block.activations))
        for batch in range(len(self.block.activations.hidden)):
            self._cache.begin(batch)
            self._run(batch, groups, self._read)
        self._finish(groups)
        for of_group in observed:
            self._check(of_group.inputs)
            of_group.statistics = self._of(of_group.inputs)

    def _of(self, group: InputGroup) -> dict[str, Statistic]:
        if group not in self._statistics:
            builds = dict(self._collects)
            if group in self._behind:
                builds["stream"] = partial(builds["stream"], outputs=group.matrices[0].view().shape[0])
            else:
                builds.pop("stream", None)
            self._statistics[group] = {name: build(inputs=group.inputs, **self._size) for name, build in builds.items()}
        return self._statistics[group]

    def _read(self, group: InputGroup, x_TI: Tensor) -> None:
        for statistic in self._of(group).values():
            statistic.add(x_TI, 0)
            if statistic.passes > 1:
                self._cache.add(x_TI, statistic)

    def _read_again(self, group: InputGroup, x_TI: Tensor) -> None:
        for statistic in self._of(group).values():
            if statistic.passes > 1:
                statistic.add(x_TI, 1)

    def _finish(self, groups: Sequence[InputGroup]) -> None:
        """What comes behind the first pass over the tokens: second passes, and the sums of all ranks."""
        self._unite(groups, 0)
        if not any(statistic.passes > 1 for group in groups for statistic in self._of(group).values()):
            return
        held, inputs = self._cache.take()
        for statistic in list(inputs):
            statistic.add_all(inputs.pop(statistic), 1)
        for batch in range(len(self.block.activations.hidden)):
            if batch not in held:  # memory was short, so these inputs are computed once more
                with self._observed(self._read_again, groups):
                    self.block.activations.run(self.block.index, batch)
        self._unite(groups, 1)

    def _run(self, batch: int, groups: Collection[InputGroup], read: Reader) -> None:
        """Runs one micro-batch: `read` gets these groups' inputs, `cross` and `stream`, if collected, both streams'."""
        of_dense, dense_behind = self._of_dense(batch, groups) if self._pairs() else ({}, {})
        inputs: dict[InputGroup, Tensor] = {}

        def read_both(group: InputGroup, x_TI: Tensor) -> None:
            read(group, x_TI)
            self._pair(group, x_TI, of_dense.get(group), batch)
            if group in dense_behind:
                inputs[group] = x_TI.clone()

        behind = self._pass(self.block.activations, batch, read_both, groups)
        for group, x_TI in inputs.items():
            if group in behind and len(x_TI) == len(behind[group]):
                statistic = self._of(group)["stream"]
                assert isinstance(statistic, StreamGram)
                lack_TO = dense_behind[group].float() - behind[group].float()
                statistic.add_lack(x_TI, lack_TO / self._behind[group].scale)

    def _unite(self, groups: Sequence[InputGroup], pass_index: int) -> None:
        united = [statistic for group in groups for statistic in self._of(group).values()]
        counts = self._ranks.gather([statistic.tokens for statistic in united])  # at once: there may be many experts
        for statistic, *tokens in zip(united, *counts, strict=True):
            statistic.unite(self._ranks, pass_index, tokens)

    def _check(self, group: InputGroup) -> None:
        gram = self._of(group).get("gram")
        if isinstance(gram, Gram) and not all_finite(gram.gram_II):
            raise Mistake(
                f"the Gram matrix of the inputs of {group.matrices[0].name} holds NaN or Inf: try model.dtype=bfloat16 "
                "or float32, otherwise the model's weights are damaged"
            )

    def _pairs(self) -> bool:
        return "cross" in self._collects and self.block.dense is not None

    def _of_dense(
        self, batch: int, groups: Collection[InputGroup]
    ) -> tuple[dict[InputGroup, Tensor], dict[InputGroup, Tensor]]:
        """In the dense stream, for one micro-batch: the groups' inputs, and what is behind those that add to it."""
        seen: dict[InputGroup, Tensor] = {}

        def read(group: InputGroup, x_TI: Tensor) -> None:
            seen[group] = x_TI.clone()

        assert self.block.dense is not None
        with self._dense_weights():
            return seen, self._pass(self.block.dense, batch, read, groups)

    def _pass(
        self, stream: Activations, batch: int, read: Reader, groups: Collection[InputGroup]
    ) -> dict[InputGroup, Tensor]:
        """Passes one micro-batch through the block: `read` gets the groups' inputs; returns the streams behind them."""
        behind: dict[InputGroup, Tensor] = {}
        waiting = {self._behind[group].reader: group for group in groups if group in self._behind}
        hidden = stream.hidden[batch]

        def read_behind(reader: str | None, x: Tensor) -> None:
            if residual_stream.is_one(x, hidden) and waiting[reader] not in behind:
                behind[waiting[reader]] = x.reshape(-1, x.shape[-1]).clone()
                if len(groups) == 1:
                    raise _Enough

        with ExitStack() as stack:
            stack.enter_context(self._observed(read, groups))
            stack.enter_context(residual_stream.reading(self.block.module, [r for r in waiting if r], read_behind))
            out = stream.run(self.block.index, batch)
            if None in waiting:
                behind[waiting[None]] = out.flatten(0, 1)
        return behind

    def _find_behind(self) -> dict[InputGroup, Behind]:
        """The streams behind the layers that alone read their input, and add to the residual stream."""
        layers = {
            group.matrices[0].name: group.matrices[0].layer
            for group in self.matrices.groups
            if len(group.matrices) == 1 and group.matrices[0].layer is not None
        }
        stream = self.block.activations
        found: dict[str, Behind] = {}
        if stream.hidden:
            hidden = stream.hidden[0].to(stream.blocks.device)
            found = residual_stream.find(self.block.module, layers, hidden, lambda: stream.run(self.block.index, 0))
        found = next(filter(None, self._ranks.gather(found)), found)
        return {
            group: found[group.matrices[0].name] for group in self.matrices.groups if group.matrices[0].name in found
        }

    def _pair(self, group: InputGroup, x_TI: Tensor, dense_TI: Tensor | None, batch: int) -> None:
        """Shows a group's `cross` the inputs that tokens have in both streams."""
        # What an expert is sent may be other tokens in each stream, and all of them may come in another order.
        if _is_expert(group.matrices[0]):
            return
        all_tokens = self.block.activations.shapes[batch].numel()
        if dense_TI is not None and len(x_TI) == len(dense_TI) == all_tokens:
            statistic = self._of(group)["cross"]
            assert isinstance(statistic, CrossGram)
            statistic.add_pair(x_TI, dense_TI)

    @contextmanager
    def _observed(self, read: Callable[[InputGroup, Tensor], None], groups: Collection[InputGroup]) -> Iterator[None]:
        """While open, for one pass of the block, `read` gets these groups' inputs; the pass may end behind them."""
        wanted = set(groups)
        one = next(iter(wanted)) if len(wanted) == 1 else None
        ends = one is not None and one.matrices[0].expert is None and one not in self._behind

        def read_wanted(group: InputGroup, x_TI: Tensor) -> None:
            if group in wanted:
                read(group, x_TI)
                if ends:
                    raise _Enough

        with suppress(_Enough), self.matrices.observed(read_wanted):
            yield

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        """While open, the block has the weights that it had at first, without biases that it got since."""
        present = [(parameter, parameter.data) for parameter, _ in self._dense]
        known = {id(parameter) for parameter, _ in self._dense}
        added = [
            (owner, name, parameter)
            for owner in (self.block.module.modules() if self._dense else ())
            for name, parameter in owner.named_parameters(recurse=False)
            if id(parameter) not in known
        ]
        try:
            for parameter, value in self._dense:
                parameter.data = value
            for owner, name, _ in added:
                owner._parameters[name] = None
            yield
        finally:
            for parameter, value in present:
                parameter.data = value
            for owner, name, bias in added:
                owner._parameters[name] = bias
