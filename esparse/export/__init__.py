"""Exports: the pruned model as a checkpoint that others can load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.export.place import check_place
from esparse.models.load import DTYPES
from esparse.packed.format import ORDERS

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from esparse.models.blocks import BlockModel
    from esparse.patterns import Pattern
    from esparse.pruning.outcome import Pruned
    from esparse.quantise import Quantise
    from esparse.recoveries import Recovery
    from esparse.shuffles import Shuffle


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A pruned model and its record."""

    blocks: BlockModel
    tokenizer: PreTrainedTokenizerBase | None
    pruned: Pruned
    tokens_SL: Tensor  # of the calibration
    record: dict[str, Any]
    folder: Path  # of the run


@dataclass(kw_only=True, slots=True)
class Export(ABC):
    """Base class of what a run exports beside its record."""

    def check(self, pattern: Pattern, recovery: Recovery, shuffle: Shuffle, quantise: Quantise) -> None:
        """Raises Mistake if the settings do not fit the method; called before anything runs."""
        return None

    def ready(self, blocks: BlockModel, recovery: Recovery, folder: Path) -> None:
        """Raises Mistake or OSError if the model cannot be exported; called before anything is pruned."""
        return None

    @abstractmethod
    def write(self, run: Finished) -> dict[str, Any] | None:
        """Writes the whole checkpoint or nothing; returns path, format and bytes for the record."""


@dataclass(kw_only=True, slots=True)
class NoExport(Export):
    """Exports nothing."""

    def write(self, run: Finished) -> None:
        return None


@dataclass(kw_only=True, slots=True)
class ToFolder(Export):
    """Base class of exports to a folder."""

    path: str | None  # folder of the checkpoint; None: `export` in the run's folder
    dtype: str  # auto (what the run computed in) | float32 | bfloat16 | float16
    # The physical order is absorbed by the rows of layers before, or else gathered. A dense checkpoint has no place for
    # gathers: it takes shuffles with foldable=true, and with original it holds no groups. Packed, original needs no
    # gathers: it is undone at loading
    order: str  # of the columns: original (their own) | physical (in which a shuffle cut the groups)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Mistake(f"export.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.order not in ORDERS:
            raise Mistake(f"export.order must be one of {', '.join(ORDERS)}, got {self.order!r}")

    def place(self, folder: Path, name: str = "export") -> Path:
        """The checkpoint's folder, for a run in `folder`."""
        return Path(self.path).expanduser() if self.path else folder / name

    def ready(self, blocks: BlockModel, recovery: Recovery, folder: Path) -> None:
        check_place(self.place(folder))

    def precision(self, blocks: BlockModel) -> torch.dtype:
        import torch

        return blocks.model.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
