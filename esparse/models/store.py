"""Stores of a model's weights: in memory, or in the files of the checkpoint, with one block at a time on the device.

`lend` puts a block's weights on the device, and `take_back` removes them. Parameters stay the same objects all the
time, so that a `Matrix` finds its parameter filled again at the block's next turn. Changed weights are always written
to files, from which a stopped run continues (pruning/journal.py).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import swap_tensors
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from esparse.errors import Mistake
from esparse.models import host_memory
from esparse.models.checkpoint import Checkpoint, loaded_as, opened
from esparse.parallel.ranks import Ranks
from esparse.records.report import write_whole

INSTEAD = "it cannot be read block by block: use model.store=memory"


def stays_wide(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """A test whether transformers keeps a tensor of some name in float32 when it loads the model in `dtype`.

    For example the biases by which DeepSeek chooses experts.
    """
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def mismatch(asked: str, name: str, shape: Iterable[int], here: Iterable[int]) -> str:
    """The sentence about a weight whose shapes differ in the checkpoint and in the model."""
    return (
        f"{name} is {list(shape)} in the checkpoint {asked}, and {list(here)} by its config.json: one of the two files "
        "is another model's, or config.json was edited (vocab_size, hidden_size, ...); copy both again"
    )


def lacks(asked: str, model: nn.Module, names: Iterable[str]) -> str:
    """The sentence about weights that the checkpoint does not have."""
    missing = sorted(names)
    some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"the checkpoint {asked} lacks {len(missing)} weights that {type(model).__name__} needs ({some}): it is "
        "incomplete or of another architecture"
    )


class Store(ABC):
    """Base class of stores; parameters are given by their names in the state dict."""

    whole: bool  # whether all weights are in memory at once

    def __init__(self, folder: Path | None = None, ranks: Ranks | None = None) -> None:
        """`folder`: for files of changed weights; None: they are not written. Only the first rank writes."""
        self.folder = folder
        self.ranks = ranks or Ranks()

    @abstractmethod
    def lend(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        """Fills the parameters, on the device."""

    @abstractmethod
    def take_back(
        self,
        parameters: Mapping[str, nn.Parameter],
        home: torch.device,
        *,
        changed: str | None,
        read_only: bool = False,
    ) -> None:
        """Removes the weights from the device; `changed`: name (without ending) of a file for changed weights.

        `read_only`: the caller did not change the weights.
        """

    @abstractmethod
    def adopt(self, parameters: Mapping[str, nn.Parameter], file: Path) -> None:
        """From now on takes the parameters from this file, which `take_back` wrote."""

    def _save(self, parameters: Mapping[str, nn.Parameter], name: str) -> Path:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.safetensors"
        if self.ranks.leads:
            tensors = {name: parameter.data.cpu().contiguous() for name, parameter in parameters.items()}
            write_whole(file, lambda draft: save_file(tensors, draft))
        self.ranks.wait()  # the others may read it
        return file


class MemoryStore(Store):
    """The whole model is in host memory; the current block is moved to the device and back."""

    whole = True

    def __init__(self, folder: Path | None = None, ranks: Ranks | None = None) -> None:
        super().__init__(folder, ranks)
        # Host memory of the weights on the device; new memory would have to be mapped page by page.
        self._homes: dict[nn.Parameter, Tensor] = {}

    def lend(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        for parameter in parameters.values():
            before, parameter.data = parameter.data, parameter.data.to(device)
            if parameter.device != before.device:
                self._homes[parameter] = before

    def take_back(
        self,
        parameters: Mapping[str, nn.Parameter],
        home: torch.device,
        *,
        changed: str | None,
        read_only: bool = False,
    ) -> None:
        for parameter in parameters.values():
            before = self._homes.pop(parameter, None)
            if before is None or (before.shape, before.dtype) != (parameter.shape, parameter.dtype):
                parameter.data = parameter.data.to(home)
            else:
                parameter.data = before if read_only else before.copy_(parameter.data)
        if changed is not None and self.folder is not None:
            self._save(parameters, changed)

    def adopt(self, parameters: Mapping[str, nn.Parameter], file: Path) -> None:
        with opened(file) as read:
            for name, parameter in parameters.items():
                parameter.data = read(name).to(parameter.device, copy=True)


class ShardStore(Store):
    """The weights are in the checkpoint's files, changed weights in files of the store.

    A parameter outside the current block is on the meta device, without values. Raises Mistake if names or shapes in
    the checkpoint differ from the model's; transformers converts such checkpoints while it loads whole models.
    """

    whole = False

    def __init__(
        self,
        skeleton: PreTrainedModel,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        folder: Path,
        ranks: Ranks | None = None,
    ) -> None:
        """`skeleton`: the model with its parameters on the meta device. `dtype`: the dtype of a loaded model."""
        super().__init__(folder, ranks)
        host_memory.keep_large_tensors_apart()
        self._dtype = dtype
        self._stays_wide = stays_wide(skeleton, dtype)
        self._places: dict[str, tuple[Path, str]] = {}
        names_in_file = _names(skeleton, checkpoint)
        for name, in_file in names_in_file.items():
            self._places[name] = (checkpoint.files[in_file], in_file)
        for module_name, module in skeleton.named_modules():
            for own, buffer in module.named_buffers(recurse=False):
                if (name := f"{module_name}.{own}".lstrip(".")) in self._places:
                    [(_, value)] = self._read([name])
                    is_wide = buffer.is_floating_point() and self._stays_wide(name)
                    module._buffers[own] = value.to(dtype=torch.float32 if is_wide else buffer.dtype, copy=True)

    def lend(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        for name, value in self._read(parameters):
            parameter = parameters[name]
            # Rounds to the model's dtype first, as loading the whole model does, except tensors kept in float32.
            through = parameter.dtype != self._dtype and not self._stays_wide(name)
            value = value.to(self._dtype) if through else value
            value = value.to(device=device, dtype=parameter.dtype, copy=True)
            swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))

    def take_back(
        self,
        parameters: Mapping[str, nn.Parameter],
        home: torch.device,
        *,
        changed: str | None,
        read_only: bool = False,
    ) -> None:
        if changed is not None:
            self.adopt(parameters, self._save(parameters, changed))
        for parameter in parameters.values():
            empty = nn.Parameter(torch.empty_like(parameter, device=home), requires_grad=parameter.requires_grad)
            swap_tensors(parameter, empty)
            del empty  # which has the weights now
        host_memory.trim()

    def adopt(self, parameters: Mapping[str, nn.Parameter], file: Path) -> None:
        self._places |= {name: (file, name) for name in parameters}

    def _read(self, names: Mapping[str, nn.Parameter] | list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of these names, file by file; each is valid only until the next iteration."""
        for file in dict.fromkeys(self._places[name][0] for name in names):
            with opened(file) as read:
                for name in names:
                    if self._places[name][0] == file:
                        yield name, read(self._places[name][1])


def _names(skeleton: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The names in the checkpoint of all parameters and buffers that it has."""
    shapes = checkpoint.shapes()
    prefix = f"{skeleton.base_model_prefix}."

    def in_file(name: str) -> str | None:
        # Some checkpoints hold the model without its head: BLOOM's names have no `transformer.`.
        return next((n for n in (name, name.removeprefix(prefix)) if n in shapes), None)

    aliases: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    missing: list[list[str]] = []
    for names in aliases.values():
        stored = [file_name for name in names if (file_name := in_file(name)) is not None]
        if not stored:
            missing.append(names)
            continue
        shape = skeleton.get_parameter(names[0]).shape
        if any(shapes[file_name] != shape for file_name in stored):
            sentence = mismatch(str(checkpoint.paths[0].parent), names[0], shapes[stored[0]], shape)
            # Weights that transformers converts while loading may have other shapes on disk.
            converts = any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(skeleton))
            raise Mistake(f"{sentence}; {INSTEAD}" if converts else sentence)
        if not _all_equal(checkpoint, stored):
            raise Mistake(f"{' and '.join(names)} are one weight in the model and differ on disk; {INSTEAD}")
        found |= dict.fromkeys(names, stored[0])
    if missing:
        as_loaded = loaded_as(skeleton)
        made = {name for in_file in checkpoint.files for name in as_loaded(in_file)}
        if lost := [names[0] for names in missing if made.isdisjoint(names)]:
            raise Mistake(lacks(str(checkpoint.paths[0].parent), skeleton, lost))
        raise Mistake(f"the checkpoint has no weight {missing[0][0]} under the model's name for it; {INSTEAD}")
    buffers = {name: in_file(name) for name, _ in skeleton.named_buffers()}
    return found | {name: file_name for name, file_name in buffers.items() if file_name is not None}


def _all_equal(checkpoint: Checkpoint, names: list[str]) -> bool:
    for other in names[1:]:
        with opened(checkpoint.files[names[0]]) as read_first, opened(checkpoint.files[other]) as read_other:
            if not torch.equal(read_first(names[0]), read_other(other)):
                return False
    return True
