"""Exports: the pruned model as a checkpoint that others can load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.models.load import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from esparse.models.blocks import BlockModel
    from esparse.patterns import Pattern
    from esparse.pruning.prune import Pruned
    from esparse.recoveries import Recovery

ORDERS = ("original", "physical")


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A pruned model and what was measured of it."""

    blocks: BlockModel
    tokenizer: PreTrainedTokenizerBase | None
    pruned: Pruned
    tokens_SL: Tensor  # of the calibration
    record: dict[str, Any]
    folder: Path  # of the run


@dataclass(kw_only=True, slots=True)
class Export(ABC):
    """What is left of a run beside its record."""

    def check(self, pattern: Pattern, recovery: Recovery, *, shuffled: bool) -> None:
        """Raises ValueError where the settings make no sense for this method; called before anything runs."""
        return None

    def ready(self, blocks: BlockModel, recovery: Recovery, folder: Path) -> None:
        """Raises ValueError or OSError where the model could not be exported; called before anything is pruned."""
        return None

    @abstractmethod
    def write(self, run: Finished) -> dict[str, Any] | None:
        """Writes the checkpoint, whole or not at all; returns its path, format and bytes for the record."""


@dataclass(kw_only=True, slots=True)
class NoExport(Export):
    """The record is all."""

    def write(self, run: Finished) -> None:
        return None


@dataclass(kw_only=True, slots=True)
class ToFolder(Export):
    """What exports to a folder have in common."""

    path: str | None  # None: `export` in the run's folder
    dtype: str  # auto (what the run computed in) | float32 | bfloat16 | float16
    order: str  # of columns: original | physical (the order in which a shuffle cut the groups)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Mistake(f"export.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.order not in ORDERS:
            raise Mistake(f"export.order must be one of {', '.join(ORDERS)}, got {self.order!r}")

    def place(self, folder: Path) -> Path:
        """Where the checkpoint goes, for a run in this folder."""
        return Path(self.path).expanduser() if self.path else folder / "export"

    def ready(self, blocks: BlockModel, recovery: Recovery, folder: Path) -> None:
        from esparse.export.writer import check_place

        check_place(self.place(folder))

    def precision(self, blocks: BlockModel) -> torch.dtype:
        import torch

        return blocks.model.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
