"""The pruning method of a run, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from esparse.allocations import Allocation, Uniform
from esparse.errors import Mistake
from esparse.metrics import Metric
from esparse.patterns import NM, Outliers, Pattern
from esparse.prepare import NoPreparation, Prepare
from esparse.quantise import NoQuantise, Quantise
from esparse.recoveries import NoRecovery, Recovery
from esparse.shuffles import NoShuffle, Shuffle
from esparse.updates import NoUpdate, Update

if TYPE_CHECKING:
    from esparse.stats import Factory

ERROR_TOKENS = 1024  # tokens for measuring a layer's relative error


@dataclass(kw_only=True, slots=True)
class Method:
    """Everything that decides which weights are kept, and their values."""

    metric: Metric
    pattern: Pattern
    shuffle: Shuffle
    update: Update = field(default_factory=NoUpdate)
    recovery: Recovery = field(default_factory=NoRecovery)
    quantise: Quantise = field(default_factory=NoQuantise)
    prepare: Prepare = field(default_factory=NoPreparation)
    allocation: Allocation = field(default_factory=Uniform)
    seed: int = 0

    def check(self) -> None:
        """Raises Mistake if the parts do not fit each other or the pattern; does not load torch."""
        if isinstance(self.pattern, Outliers):
            base, outliers = self.pattern.parts()
            removed = (base.m - base.n) * outliers.m // base.m
            if outliers.n >= removed:
                raise Mistake(f"outliers {outliers} keep every weight, since {base} removes {removed} of {outliers.m}")
        for part in (self.allocation, self.shuffle, self.update, self.recovery, self.quantise):
            part.check(self.pattern)
        if self.metric.gradients() == "model" and not isinstance(self.prepare, NoPreparation):
            raise Mistake(
                "the gradients of the whole model are taken before any block is prepared and would not fit the "
                "prepared weights: use metric.source=block or prepare=none"
            )
        if self.quantises() and self.recovery.needs_sequences():
            raise Mistake(
                "the recovery trains values that quantise has rounded, and would leave its grid: use recovery=none or "
                "quantise=none"
            )
        if not 0 <= self.seed < 2**31:
            raise Mistake(f"seed must be between 0 and 2147483647, got {self.seed}")

    def idle(self) -> dict[str, str]:
        """Why a part changes nothing under this pattern, as the end of a sentence, by its group."""
        why = {}
        if not isinstance(self.pattern, NM | Outliers) and not isinstance(self.shuffle, NoShuffle):
            why["shuffle"] = "which has no groups of n:m"
        if self.update.is_idle(self.pattern) and not self.quantises():
            why["update"] = "whose kept rows keep all of their weights"
        if self.recovery.is_idle(self.pattern):
            why["recovery"] = "whose kept rows keep all of their weights"
        return why

    def collects(self) -> dict[str, Factory]:
        from esparse.pruning.returned import statistics
        from esparse.stats import ColumnNorm, TokenSample

        asked: dict[str, Factory] = {"norm": ColumnNorm, "sample": partial(TokenSample, most=ERROR_TOKENS)}
        parts = (self.metric, self.shuffle, self.update, self.recovery, self.quantise)
        return asked | {name: build for part in parts for name, build in statistics(part, part.collects()).items()}

    def needs_dense_stream(self) -> bool:
        """Whether the hidden states that dense blocks make flow beside those that pruned ones make."""
        return self.recovery.needs_dense_stream() or self.update.needs_dense_stream()

    def sequential(self) -> bool:
        """Whether a layer is observed again once the layers before it in its block are pruned."""
        return self.update.sequential_layers()

    def quantises(self) -> bool:
        """Whether kept values are rounded."""
        return not isinstance(self.quantise, NoQuantise)

    def sequences_at_once(self) -> int | None:
        """The most sequences of a micro-batch (1 if gradients per sequence are needed); None: any number."""
        return 1 if self.metric.gradients() == "block" else self.recovery.sequences_at_once()

    def needs_all_sequences(self) -> str | None:
        """Why one process needs all calibration sequences, as the first half of a sentence; None: it does not."""
        if self.metric.gradients() != "none":
            return f"metric.source={self.metric.gradients()} takes gradients on all calibration sequences"
        if not isinstance(self.prepare, NoPreparation):
            return "the preparation (prepare) looks at all calibration sequences before the statistics are taken"
        if self.recovery.needs_sequences():
            return "the recovery trains on all calibration sequences"
        return None

    def needs_whole_model(self) -> str | None:
        """Why all weights must be in memory, as the first half of a sentence; None: they need not."""
        if self.metric.gradients() == "model":
            return "metric.source=model takes gradients of the whole model"
        return "distillation trains the whole model" if self.recovery.needs_parent() else None
