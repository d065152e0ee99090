"""Distillation: trains the whole pruned model, with fixed keep masks, to predict what its dense parent predicts.

The loss is Hinton et al.'s (2015, arXiv 1503.02531) with the parent's distribution as the only target. `train=lora`
trains only low-rank additions under the mask: MaskLoRA of PERP (Zimmer et al. 2023, arXiv 2312.15230). Two regularisers
are available: a group LASSO (Yuan and Lin 2006) on the pattern's groups, and dropout of whole groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.parts import bounds
from esparse.recoveries import PrunedModel, Recovery, Training

if TYPE_CHECKING:
    from esparse.patterns import Pattern
    from esparse.records.report import RecoveryReport


@dataclass(kw_only=True, slots=True)
class Distill(Recovery):
    """Minimises KL(parent || student) over the calibration tokens, after all blocks are pruned."""

    train: str  # full (the kept weights of pruned matrices themselves) | lora (a low-rank addition to each matrix)
    all_parameters: bool  # with train=full: norms, biases, embeddings, the head and layers that stayed dense, too
    rank: int  # with train=lora: of the addition
    alpha: float  # with train=lora: the addition counts alpha / rank times
    # A loss that ends higher than it began is undone, and the log says so; with `fresh` it is that of other sequences
    learning_rate: float  # of AdamW
    # With train=full
    scaled: bool  # the learning rate is a share of the root mean square of each trained tensor's kept weights
    warm_up: float  # share of the steps in which the learning rate rises; then it falls linearly to 0
    epochs: int  # passes over the calibration sequences
    # Passes over the same sequences soon learn these alone. Tokens that are given as such, from Python, have no others
    fresh: bool  # each pass but the first reads as many other sequences of the calibration's text, drawn at random
    batch: int  # sequences of one step
    clip: float | None  # greatest norm of a step's gradient; None: any
    # The trained weights themselves are held in float32, and a model in float16 is trained in it
    products: str  # precision of the training's products: auto (bfloat16 of a model in bfloat16) | float32
    temperature: float  # by which both models' logits are divided
    lasso: float  # weight of the group LASSO on the kept weights, the sum of the norms of all groups of m; 0: none
    dropout: float  # probability with which a step does without a group of a matrix's inputs; 0: never

    def __post_init__(self) -> None:
        if self.train not in ("full", "lora"):
            raise Mistake(f"recovery.train must be full or lora, got {self.train!r}")
        if self.products not in ("auto", "float32"):
            raise Mistake(f"recovery.products must be auto or float32, got {self.products!r}")
        if self.scaled and self.train == "lora":
            raise Mistake(
                "recovery.scaled goes by the size of the trained weights, which recovery.train=lora begins at zero: "
                "use it with recovery.train=full, or leave it out"
            )
        if self.all_parameters and self.train == "lora":
            raise Mistake(
                "recovery.all_parameters trains more than the pruned matrices, recovery.train=lora less: use it with "
                "recovery.train=full, or leave it out"
            )
        bounds.check(
            "recovery",
            self,
            positive=("rank", "epochs", "batch", "alpha", "learning_rate", "temperature", "clip"),
            shares=("warm_up",),
            not_negative=("lasso",),
        )
        if not 0 <= self.dropout < 1:
            raise Mistake(f"recovery.dropout is a probability, at least 0 and below 1, got {self.dropout:g}")

    def check(self, pattern: Pattern) -> None:
        if (self.lasso or self.dropout) and pattern.swap_width is None:
            raise Mistake(
                f"recovery.lasso and recovery.dropout work on the groups of a pattern, and {pattern} has none: "
                "set both to 0, or ask for a pattern such as 2:4"
            )

    def further_samples(self) -> int:
        """One for each pass but the first, and one for the loss: an update may have fitted the weights to the first."""
        return self.epochs if self.fresh else 0

    def needs_parent(self) -> bool:
        return True

    def trainings(self) -> list[Training]:
        trained = "added" if self.train == "lora" else "all" if self.all_parameters else "pruned"
        # The parent's pass, the student's and its backward pass; the losses before and after take a few sequences
        return [
            Training(passes=4 * self.epochs, sequences=self.batch, whole=True, trained=trained, products=self.products)
        ]

    def whole(self, pruned: PrunedModel) -> list[RecoveryReport]:
        from esparse.recoveries.distill_training import distill
        from esparse.recoveries.masked_parameters import masked_parameters

        assert pruned.parent is not None
        masked = masked_parameters(pruned.keeps, pruned.groupings, pruned.blocks.device)
        samples = [pruned.tokens_SL, *pruned.further[: self.further_samples()]]
        read, others = samples[: self.epochs], samples[self.epochs :]
        return [distill(self, pruned.blocks, pruned.parent, read, masked, pruned.seed, measured_SL=(others or read)[0])]
