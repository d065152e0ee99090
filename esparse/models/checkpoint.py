"""Reads the files of a checkpoint: which tensor is in which file, and single tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from esparse.errors import Mistake
from esparse.models.model_files import NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Checkpoint:
    """A model's weights on disk; `files` maps each tensor's name to its file."""

    def __init__(self, entry: Path) -> None:
        """`entry`: the file with all weights, or the index of several files."""
        self.paths = paths(entry)
        # The shards say what is in them, as transformers has it: an index may be older than they are.
        self.files = {name: path for path in self.paths for name in shapes(path)}

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor, without reading any."""
        return {name: shape for path in self.paths for name, shape in shapes(path).items()}

    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor in the first file."""
        with opened(self.paths[0]) as read:
            for name in shapes(self.paths[0]):
                if (tensor := read(name)).is_floating_point():
                    return tensor.dtype
        raise Mistake(f"{self.paths[0]} holds no floating-point weights")


def paths(entry: Path) -> list[Path]:
    """The files of weights that belong to `entry`; does not read them."""
    if not entry.name.endswith(".index.json"):
        return [entry]
    return sorted({entry.parent / part for part in json.loads(entry.read_text())["weight_map"].values()})


def find(path: str, **where: Any) -> Path | None:
    """The entry file of a local or hub model's checkpoint on this machine; None if there is none.

    Fetches a hub model's files that the cache lacks, the same files that transformers would fetch.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    local = Path(path).is_dir()
    for name in NAMES:
        if local:
            entry = Path(path) / name if (Path(path) / name).is_file() else None
        else:
            found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)
            entry = Path(found) if found else None
            if entry is not None and name.endswith(".index.json"):
                get_checkpoint_shard_files(path, str(entry), **where)
        if entry is not None:
            return entry
    return None


def loaded_as(model: PreTrainedModel) -> Callable[[str], set[str]]:
    """Under which names of its state dict transformers may load a tensor of a checkpoint into the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    def names(in_file: str) -> set[str]:
        conversions: Any = ((renamings, converters), ([], []))
        return {rename_source_key(in_file, *each, prefix, state)[0] for each in conversions}

    return names


@contextmanager
def opened(file: Path) -> Iterator[Callable[[str], Tensor]]:
    """While open, gives tensors of a file by name; they may be views of the file, so copy tensors that you keep."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            yield tensors.get_tensor
    else:
        yield _mapped(file).__getitem__


def shapes(file: Path) -> dict[str, torch.Size]:
    """The shapes of a file's tensors by name."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return {name: torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return {name: tensor.shape for name, tensor in _mapped(file).items()}


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:  # PyTorch's format before 1.6, or a file cut short
        first = str(error).partition("\n")[0]
        raise Mistake(f"{file} cannot be read tensor by tensor ({first}): use model.store=memory") from error
    return tensors
