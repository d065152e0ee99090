"""Block reconstruction: trains the kept weights of a pruned block to return what the dense block returned.

EBFT (Guo et al. 2024, arXiv 2402.12419) trains the whole block; "A Free Lunch in LLM Compression" (2025,
arXiv 2510.14444) trains attention and MLP separately, on the dense model's activations; the transformer matching of
3BASiL (2026, arXiv 2603.01376) trains all parameters of a block. Here they are settings of one method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.parts import bounds
from esparse.recoveries import Recovery, Training

if TYPE_CHECKING:
    from esparse.models.block import Block
    from esparse.recoveries import Finish

KNOWN = {
    "window": ("submodule", "block"),
    "inputs": ("dense", "propagated"),
    "targets": ("block", "parent"),
    "train": ("weights", "all"),
    "decay": ("linear", "cosine"),
    "products": ("auto", "float32"),
}


@dataclass(kw_only=True, slots=True)
class Window(Recovery):
    """Minimises the mean squared error to the dense output, window after window, block after block."""

    # The loss is taken behind each submodule that holds layers and then, for what is left, behind the block; or behind
    # the block only
    window: str  # submodule (attention, then the rest of the block) | block
    inputs: str  # what enters a block: dense (what the dense model has there) | propagated (what pruned blocks return)
    targets: str  # block (what the dense block makes of the same inputs) | parent (what the dense model has there)
    train: str  # weights (the kept weights of pruned matrices) | all (norms, biases and skipped layers too)
    # A loss that ends higher than it began is undone, and the log says so
    learning_rate: float  # of AdamW
    scaled: bool  # the learning rate is a share of the root mean square of each trained tensor's kept weights
    final_rate: float  # share of the learning rate at the end
    decay: str  # the way to the final rate: linear | cosine
    warm_up: float  # share of the steps in which the learning rate rises
    epochs: int  # passes over the calibration sequences
    batch: int  # sequences of one step
    beta2: float  # of AdamW
    weight_decay: float  # of AdamW
    clip: float | None  # greatest norm of a step's gradient; None: any
    # The trained weights themselves are held in float32, and a model in float16 is trained in it
    products: str  # precision of the training's products: auto (bfloat16 of a model in bfloat16) | float32

    def __post_init__(self) -> None:
        for setting, known in KNOWN.items():
            if getattr(self, setting) not in known:
                raise Mistake(f"recovery.{setting} must be one of {', '.join(known)}, got {getattr(self, setting)!r}")
        bounds.check(
            "recovery",
            self,
            positive=("epochs", "batch", "learning_rate", "clip"),
            shares=("warm_up", "final_rate"),
            not_negative=("weight_decay",),
        )
        if not 0 <= self.beta2 < 1:
            raise Mistake(f"recovery.beta2 must be at least 0 and below 1, got {self.beta2:g}")

    def sequences_at_once(self) -> int:
        return self.batch

    def needs_dense_stream(self) -> bool:
        return self.inputs == "dense" or self.targets == "parent"

    def trainings(self) -> list[Training]:
        # Forward and backward, and the loss before and after. A window of a submodule ends there: at most twice as much
        windows = 2 if self.window == "submodule" else 1
        return [Training(passes=(3 * self.epochs + 2) * windows, sequences=self.batch)]

    def begin(self, block: Block) -> Finish:
        from esparse.recoveries.window_training import begin

        return begin(self, block)
