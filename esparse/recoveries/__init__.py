"""Recoveries: what is done once weights are gone, the keep masks held (DSnoT alone moves them, within the pattern).

A recovery may work on three scales, and implements the methods of those it works on: on each layer right after its
update, on each block once its layers are pruned, on the whole model at the end.

Shapes: O outputs, I inputs, S sequences, L tokens. Polarity: True in `keep` means the weight survives.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from esparse.models.block import Block
    from esparse.models.blocks import BlockModel
    from esparse.models.matrices import Matrix
    from esparse.patterns import Grouping, Pattern
    from esparse.records.report import RecoveryReport
    from esparse.stats import Factory
    from esparse.updates import Layer, Solution

# Takes the keep masks of all layers pruned so far, by the weight's name in the state dict.
Finish = Callable[[Mapping[str, "Tensor"]], "list[RecoveryReport]"]


@dataclass(frozen=True, slots=True, eq=False)
class PrunedModel:
    """A model whose blocks are all pruned, and what a recovery of the whole of it may look at."""

    blocks: BlockModel
    parent: nn.Module | None  # the dense model, where the recovery asked for it
    tokens_SL: Tensor  # of the calibration
    keeps: Mapping[str, Tensor]  # by the weight's name in the state dict
    groupings: Sequence[tuple[Matrix, Grouping]]  # how each matrix was cut into groups
    seed: int


@dataclass(kw_only=True, slots=True)
class Recovery(ABC):  # noqa: B024 - a recovery works on one scale or another, so no method must be there
    """Repairs what pruning did; does nothing by itself."""

    def collects(self) -> dict[str, Factory]:
        """The statistics of a layer's input that `layer` will look up in `layer.stats`, by name; none by default."""
        return {}

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError where the recovery makes no sense for this pattern; called before anything runs."""
        return None

    def sequences_at_once(self) -> int | None:
        """At most how many calibration sequences a micro-batch may hold; None: the recovery does not mind."""
        return None

    def needs_dense_stream(self) -> bool:
        """Whether `Block.dense` is wanted: the hidden states of the dense model beside those of the pruned one."""
        return False

    def needs_sequences(self) -> bool:
        """Whether more of the calibration sequences is looked at than the statistics of a layer's input."""
        return type(self).begin is not Recovery.begin or type(self).whole is not Recovery.whole

    def needs_parent(self) -> bool:
        """Whether `whole` is given the dense model: a copy of it is kept on the host then."""
        return False

    def adds_biases(self) -> bool:
        """Whether `layer` may give a bias to a layer that has none."""
        return False

    def layer(self, layer: Layer, pruned: Solution) -> Solution:
        """The layer after the recovery, where `pruned` is how the update left it."""
        return pruned

    def begin(self, block: Block) -> Finish:
        """Called while a block is dense; what it returns is called once the block is pruned, and reports."""
        return lambda keeps: []

    def whole(self, pruned: PrunedModel) -> list[RecoveryReport]:
        """Called once, when all blocks are pruned."""
        return []


@dataclass(kw_only=True, slots=True)
class NoRecovery(Recovery):
    """One-shot pruning: nothing is done."""


@dataclass(kw_only=True, slots=True)
class Chain(Recovery):
    """Two recoveries in a row, on every scale."""

    first: Recovery  # the recovery that acts first; its settings stand behind it
    second: Recovery  # the one that acts on what the first left: `recovery.second.epochs=5`

    def collects(self) -> dict[str, Factory]:
        return self.first.collects() | self.second.collects()

    def check(self, pattern: Pattern) -> None:
        self.first.check(pattern)
        self.second.check(pattern)

    def sequences_at_once(self) -> int | None:
        wanted = [of.sequences_at_once() for of in (self.first, self.second)]
        return min((most for most in wanted if most is not None), default=None)

    def needs_dense_stream(self) -> bool:
        return self.first.needs_dense_stream() or self.second.needs_dense_stream()

    def needs_sequences(self) -> bool:
        return self.first.needs_sequences() or self.second.needs_sequences()

    def needs_parent(self) -> bool:
        return self.first.needs_parent() or self.second.needs_parent()

    def adds_biases(self) -> bool:
        return self.first.adds_biases() or self.second.adds_biases()

    def layer(self, layer: Layer, pruned: Solution) -> Solution:
        return self.second.layer(layer, self.first.layer(layer, pruned))

    def begin(self, block: Block) -> Finish:
        first, second = self.first.begin(block), self.second.begin(block)
        return lambda keeps: [*first(keeps), *second(keeps)]

    def whole(self, pruned: PrunedModel) -> list[RecoveryReport]:
        return [*self.first.whole(pruned), *self.second.whole(pruned)]
