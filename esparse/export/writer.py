"""A checkpoint as it grows: one file of weights per block, and at the end all that makes it a checkpoint.

It grows in a folder beside its place and is moved there when it is whole, so that a run that is stopped leaves none
that looks finished. The model never has to be in memory as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from esparse.errors import Mistake
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.reorder import Reordered, reorder
from esparse.packed.checksums import checksum
from esparse.records.report import write_json, write_whole

if TYPE_CHECKING:
    from esparse.export import Finished

INDEX = "model.safetensors.index.json"
MARK = "esparse.json"  # what tells our checkpoints from other folders; written last


def check_place(place: Path) -> None:
    """Raises ValueError where something is that no export left, which one would have to overwrite."""
    if place.exists() and not (place / MARK).is_file() and (not place.is_dir() or any(place.iterdir())):
        raise Mistake(f"export.path={place} is there already, and is no export of esparse: name another folder")


class Draft:
    """The checkpoint that is being written; as a context, it appears at its place at the end or not at all."""

    def __init__(self, place: Path, run: Finished) -> None:
        self.place, self.run = place, run
        self.folder = place.with_name(f"{place.name}.part")
        self.bytes = 0
        self.files: dict[str, str] = {}  # checksums by name
        self._where: dict[str, str] = {}
        self._shards = 1 + len(run.blocks.blocks)

    def __enter__(self) -> Draft:
        check_place(self.place)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes the next file of weights."""
        number = len(self.files) + 1
        name = f"model-{number:05}-of-{self._shards:05}.safetensors"
        on_disk = {key: value.contiguous() for key, value in tensors.items()}
        write_whole(self.folder / name, lambda draft: save_file(on_disk, draft, metadata={"format": "pt"}))
        self.files[name] = checksum(self.folder / name)
        self._where |= dict.fromkeys(on_disk, name)
        self.bytes += sum(value.nbytes for value in on_disk.values())

    def finish(self, dtype: torch.dtype, card: str, mark: dict[str, Any], quantization: dict[str, Any] | None) -> None:
        """Writes what stands beside the weights: their index, configuration, tokenizer and the model card."""
        model = self.run.blocks.model
        write_json(
            self.folder / INDEX,
            {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self._where.items()))},
        )
        model.config.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text())
        config |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
        if quantization is not None:
            config["quantization_config"] = quantization
        write_json(self.folder / "config.json", config)
        if model.can_generate():
            model.generation_config.save_pretrained(self.folder)
        if self.run.tokenizer is not None:  # whoever prunes in Python may have none
            self.run.tokenizer.save_pretrained(self.folder)
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        write_json(self.folder / MARK, mark | {"files": self.files})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        before = self.place.with_name(f"{self.place.name}.old")
        shutil.rmtree(before, ignore_errors=True)
        if self.place.exists():
            os.replace(self.place, before)
        os.replace(self.folder, self.place)
        shutil.rmtree(before, ignore_errors=True)


def parts(run: Finished, *, physical: bool, gathers: bool) -> Iterator[tuple[dict[str, Tensor], Reordered]]:
    """The model's weights by their names in its state dict, first all that is no block, then block by block.

    With `physical` each comes with how the orders of a shuffle are made physical in it; with `gathers` also those
    that nothing can absorb. What is in front of a comma is valid until the next one is asked for.
    """
    blocks = run.blocks
    orders = run.pruned.orders if physical else {}
    with blocks.ends_resident():
        yield _tensors(blocks.model, lambda name: not name.startswith(f"{blocks.prefix}.")), Reordered()
    activations = None
    if orders:
        most = max(1, blocks.batch_tokens // run.tokens_SL.shape[1])
        activations = Activations(blocks, run.tokens_SL[:most])  # enough to see what is connected with what
    for index in range(len(blocks.blocks)):
        prefix = f"{blocks.prefix}.{index}."
        with blocks.resident(index):
            plan = Reordered()
            if activations is not None:
                plan = reorder(Block(index, activations, None, (), 0), orders, gathers=gathers)
                activations.advance(index)
            yield _tensors(blocks.model, lambda name, prefix=prefix: name.startswith(prefix)), plan


def on_disk(run: Finished, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in this precision under the names that the family's checkpoints have; no -0.0 among them."""
    return revert_weight_conversion(run.blocks.model, {name: cast(value, dtype) for name, value in tensors.items()})


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the host, floating point in this precision; no -0.0."""
    if not value.is_floating_point():
        return value.cpu().clone()
    value = value.detach().to("cpu", dtype, copy=True)
    return value.masked_fill_(value == 0, 0.0)


def _tensors(model: torch.nn.Module, wanted: Any) -> dict[str, Tensor]:
    """Parameters, each under one name, and the buffers that belong to a checkpoint."""
    found = {name: parameter.data for name, parameter in model.named_parameters() if wanted(name)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = model.state_dict()
    return found | {name: value for name, value in stored.items() if name not in parameters and wanted(name)}
