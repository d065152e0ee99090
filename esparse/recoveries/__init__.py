"""Recoveries: repair a pruned model and leave its keep masks unchanged (only DSnoT moves them, within the pattern).

A recovery works on one or more of three scales, and implements the methods of these scales: each layer right after its
update, each block after its layers are pruned, and the whole model at the end.

Shapes: O outputs, I inputs, S sequences, L tokens. Polarity: True in `keep` means the weight is kept.
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

# Called with the keep masks of all layers pruned so far, by the weight's name in the state dict.
Finish = Callable[[Mapping[str, "Tensor"]], "list[RecoveryReport]"]


@dataclass(frozen=True, slots=True, eq=False)
class PrunedModel:
    """A fully pruned model, and what a recovery of the whole model may use."""

    blocks: BlockModel
    parent: nn.Module | None  # the dense model, if the recovery asked for it
    tokens_SL: Tensor  # of the calibration
    further: Sequence[Tensor]  # as many other tokens of the same text as `further_samples` asks for; none of no text
    keeps: Mapping[str, Tensor]  # by the weight's name in the state dict
    groupings: Sequence[tuple[Matrix, Grouping]]  # how each matrix was cut into groups
    seed: int


@dataclass(kw_only=True, frozen=True, slots=True)
class Training:
    """What a recovery's training takes, for `dry_run`."""

    passes: float  # forward passes of all calibration sequences, a backward pass counted as two
    sequences: int  # of a step; a micro-batch has no more
    whole: bool = False  # through the whole model with its head, not block by block
    trained: str = "pruned"  # pruned (the pruned matrices) | all (every parameter) | added (few numbers beside them)
    products: str = "float32"  # float32 | auto (bfloat16 of a model in bfloat16)


@dataclass(kw_only=True, slots=True)
class Recovery(ABC):  # noqa: B024 - a recovery may work on any scale, so no method is abstract
    """Base class of recoveries; does nothing by itself."""

    def collects(self) -> dict[str, Factory]:
        """The input statistics that `layer` finds in `layer.stats`, by name; default: none."""
        return {}

    def check(self, pattern: Pattern) -> None:
        """Raises Mistake if the recovery does not fit this pattern; called before anything runs."""
        return None

    def is_idle(self, pattern: Pattern) -> bool:
        """Whether the recovery changes nothing under this pattern, whatever the weights."""
        return False

    def skips(self) -> list[str]:
        """Regular expressions of layer names that it leaves alone; each must be found in one; default: none."""
        return []

    def sequences_at_once(self) -> int | None:
        """The most calibration sequences of a micro-batch; None: any number."""
        return None

    def needs_dense_stream(self) -> bool:
        """Whether the recovery needs `Block.dense`, the hidden states of the dense model."""
        return False

    def needs_sequences(self) -> bool:
        """Whether the recovery uses the calibration sequences themselves, not only statistics of them."""
        return type(self).begin is not Recovery.begin or type(self).whole is not Recovery.whole

    def needs_parent(self) -> bool:
        """Whether `whole` needs the dense model, of which a copy is then kept on the host."""
        return False

    def trainings(self) -> list[Training]:
        """What the recovery trains; default: nothing."""
        return []

    def further_samples(self) -> int:
        """How many further samples of the calibration text, as large as the first, `whole` wants; default: none."""
        return 0

    def adds_biases(self) -> bool:
        """Whether `layer` may add a bias to a layer without one."""
        return False

    def layer(self, layer: Layer, pruned: Solution) -> Solution:
        """The layer after the recovery; `pruned`: the layer after the update."""
        return pruned

    def begin(self, block: Block) -> Finish:
        """Called while a block is still dense; returns a function that repairs the block after pruning, and reports."""
        return lambda keeps: []

    def whole(self, pruned: PrunedModel) -> list[RecoveryReport]:
        """Repairs the whole model; called once, after all blocks are pruned."""
        return []


@dataclass(kw_only=True, slots=True)
class NoRecovery(Recovery):
    """One-shot pruning: no recovery."""


@dataclass(kw_only=True, slots=True)
class Chain(Recovery):
    """Two recoveries, one after the other, on every scale."""

    # Its settings stand behind it. Another one is chosen by `recovery@recovery.first=bias`
    first: Recovery  # the recovery that acts first
    # Likewise: `recovery.second.epochs=5`, `recovery@recovery.second=window`
    second: Recovery  # the one that acts on what the first left

    def collects(self) -> dict[str, Factory]:
        return self.first.collects() | self.second.collects()

    def skips(self) -> list[str]:
        return [*self.first.skips(), *self.second.skips()]

    def check(self, pattern: Pattern) -> None:
        self.first.check(pattern)
        self.second.check(pattern)

    def is_idle(self, pattern: Pattern) -> bool:
        return self.first.is_idle(pattern) and self.second.is_idle(pattern)

    def sequences_at_once(self) -> int | None:
        wanted = [of.sequences_at_once() for of in (self.first, self.second)]
        return min((most for most in wanted if most is not None), default=None)

    def needs_dense_stream(self) -> bool:
        return self.first.needs_dense_stream() or self.second.needs_dense_stream()

    def needs_sequences(self) -> bool:
        return self.first.needs_sequences() or self.second.needs_sequences()

    def needs_parent(self) -> bool:
        return self.first.needs_parent() or self.second.needs_parent()

    def trainings(self) -> list[Training]:
        return [*self.first.trainings(), *self.second.trainings()]

    def further_samples(self) -> int:
        return max(self.first.further_samples(), self.second.further_samples())

    def adds_biases(self) -> bool:
        return self.first.adds_biases() or self.second.adds_biases()

    def layer(self, layer: Layer, pruned: Solution) -> Solution:
        return self.second.layer(layer, self.first.layer(layer, pruned))

    def begin(self, block: Block) -> Finish:
        first, second = self.first.begin(block), self.second.begin(block)
        return lambda keeps: [*first(keeps), *second(keeps)]

    def whole(self, pruned: PrunedModel) -> list[RecoveryReport]:
        return [*self.first.whole(pruned), *self.second.whole(pruned)]
