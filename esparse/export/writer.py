"""Writes a checkpoint: one file of weights per block, then index, configuration, tokenizer and card.

It is written into a draft folder and moved to its place when it is complete, so a run that is stopped leaves no
checkpoint that looks finished. The whole model never has to be in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from esparse.errors import Mistake
from esparse.export.place import MARK, WORKSHOP_MARK, check_place, is_workshop, real_place, workshop_of
from esparse.models import source
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.reorder import Reordered, reorder
from esparse.models.skeleton import skeleton_of
from esparse.models.store import stays_wide
from esparse.packed.checksums import checksum
from esparse.packed.format import WITHOUT_ESPARSE
from esparse.records.report import write_json, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from esparse.export import Finished

log = logging.getLogger("esparse")

INDEX = "model.safetensors.index.json"
EXTRA_BYTES = 2**31  # size of a file of tensors that the model did not load

Precision = Callable[[str], torch.dtype]  # of a tensor, by its name in the state dict


class Draft:
    """A checkpoint that is being written; as a context manager it is moved to its place at the end, or deleted."""

    def __init__(self, place: Path, run: Finished) -> None:
        self.place, self.run = place, run
        self.workshop = workshop_of(place)
        self.folder = self.workshop / "new"
        self.bytes = 0
        self.files: dict[str, str] = {}  # checksums by name
        self._where: dict[str, str] = {}
        self._shards = 1 + len(run.blocks.blocks)

    def __enter__(self) -> Draft:
        check_place(self.place)
        self._put_back()  # a process that was killed here may have moved it
        _clear(self.workshop)
        self.workshop.mkdir(parents=True, exist_ok=True)
        (self.workshop / WORKSHOP_MARK).write_text("A draft of an export of esparse, which no longer needs it.\n")
        self.folder.mkdir()
        return self

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes the next file of weights."""
        number = len(self.files) + 1
        self._add(f"model-{number:05}-of-{self._shards:05}.safetensors", tensors)

    def _add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        on_disk = {key: value.contiguous() for key, value in tensors.items()}
        write_whole(self.folder / name, lambda draft: save_file(on_disk, draft, metadata={"format": "pt"}))
        self.files[name] = checksum(self.folder / name)
        self._where |= dict.fromkeys(on_disk, name)
        self.bytes += sum(value.nbytes for value in on_disk.values())

    def finish(self, dtype: torch.dtype, card: str, mark: dict[str, Any], quantization: dict[str, Any] | None) -> None:
        """Writes the index of the weights, the configuration, the tokenizer and the model card.

        Copies the other files of the original checkpoint.
        """
        model = self.run.blocks.model
        write_json(
            self.folder / INDEX,
            {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self._where.items()))},
        )
        model.config.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text())
        config.pop("quantization_config", None)  # it describes weights that were dequantised since
        config |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
        if quantization is not None:
            config |= {"quantization_config": quantization, "transformers_weights": WITHOUT_ESPARSE}
        if model.can_generate():
            try:
                model.generation_config.save_pretrained(self.folder)
            except ValueError:  # such as a temperature without do_sample, which transformers loads and does not save
                model.generation_config.to_json_file(self.folder / "generation_config.json")
        if self.run.tokenizer is not None:  # a caller of the Python API may have none
            self.run.tokenizer.save_pretrained(self.folder)
        self._copy_beside(model)
        write_json(self.folder / "config.json", self._with_own_code(config))
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        write_json(self.folder / MARK, mark | {"files": self.files})

    def add_not_loaded(self) -> int:
        """Copies the original's tensors that the model did not load; returns their number."""
        checkpoint, names = source.not_loaded(self.run.blocks.model)
        if checkpoint is None or not names:
            return 0
        held: dict[str, Tensor] = {}
        files = 0

        def write() -> None:
            nonlocal files
            files += 1
            self._add(f"model-not-loaded-{files:05}.safetensors", held)
            held.clear()

        for name, value in source.tensors(checkpoint, [name for name in names if name not in self._where]):
            if held and sum(v.nbytes for v in held.values()) + value.nbytes > EXTRA_BYTES:
                write()
            held[name] = value.clone()
        if held:
            write()
        return len(names)

    def _copy_beside(self, model: PreTrainedModel) -> None:
        folder = source.folder_of(model)
        for file in [] if folder is None else source.files_beside(folder):
            assert folder is not None
            copied = self.folder / file.relative_to(folder)
            if not copied.exists():
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)

    def _with_own_code(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration, with references to own code pointing to this folder if the code's file is here."""

        def here(value: Any) -> Any:
            if isinstance(value, list):
                return [here(one) for one in value]
            own = str(value).rpartition("--")[2]
            return own if value and (self.folder / f"{own.partition('.')[0]}.py").is_file() else value

        if "auto_map" in config:
            config["auto_map"] = {kind: here(value) for kind, value in config["auto_map"].items()}
        return config

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._move()
        finally:
            _clear(self.workshop)

    def _move(self) -> None:
        real = real_place(self.place)
        if real.exists():
            os.replace(real, self.workshop / "old")
        try:
            os.replace(self.folder, real)
        except OSError:
            self._put_back()
            raise

    def _put_back(self) -> None:
        """Moves the export before to its place, if a new one did not get there."""
        before, real = self.workshop / "old", real_place(self.place)
        if before.is_dir() and is_workshop(self.workshop) and not real.exists():
            os.replace(before, real)


def _clear(workshop: Path) -> None:
    """Removes a workshop of esparse, its mark last, so that what is left of it can still be told."""
    if not workshop.is_dir() or not is_workshop(workshop):
        return
    for name in ("new", "old"):
        shutil.rmtree(workshop / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (workshop / WORKSHOP_MARK).unlink(missing_ok=True)
        workshop.rmdir()


def parts(run: Finished, *, physical: bool, gathers: bool) -> Iterator[tuple[dict[str, Tensor], Reordered]]:
    """Yields the model's weights by their names in its state dict: first what is no block, then block by block.

    `physical`: beside the weights comes the plan that makes the shuffle's orders physical in them; `gathers`: the plan
    has gathers for orders that nothing absorbs. The tensors of each pair are valid only until the next iteration.
    """
    blocks = run.blocks
    orders = run.pruned.orders if physical else {}
    with blocks.ends_resident():
        yield _tensors(blocks.model, lambda name: not name.startswith(f"{blocks.prefix}.")), Reordered()
    activations = None
    if orders:
        most = max(1, blocks.batch_tokens // run.tokens_SL.shape[1])
        activations = Activations(blocks, run.tokens_SL[:most])  # enough to find what each layer reads
    for index in range(len(blocks.blocks)):
        prefix = f"{blocks.prefix}.{index}."
        with blocks.resident(index):
            plan = Reordered()
            if activations is not None:
                plan = reorder(Block(index, activations, None, (), 0), orders, gathers=gathers)
                activations.advance(index)
            yield _tensors(blocks.model, lambda name, prefix=prefix: name.startswith(prefix)), plan


def on_disk(run: Finished, tensors: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """The tensors cast to their dtype, without -0.0, under the names that the family's checkpoints use."""
    stored = {name: cast(value, precision(name), name) for name, value in tensors.items()}
    return revert_weight_conversion(run.blocks.model, stored)


def precisions(model: PreTrainedModel, dtype: torch.dtype) -> Precision:
    """The dtype of each tensor in an export to `dtype`: float32 for tensors that the family keeps in float32."""
    kept: set[str] = set()
    is_wide = stays_wide(model, dtype)
    if dtype.itemsize < 4:
        if model.dtype == dtype:
            tensors = [*model.named_parameters(), *model.named_buffers()]
        else:  # the run computed in float32: which tensors would be float32 in a half-precision model?
            again = skeleton_of(model, dtype)  # if there is none, such tensors are known by their names only
            tensors = [] if again is None else [*again.named_parameters(), *again.named_buffers()]
        kept = {name for name, value in tensors if value.is_floating_point() and value.dtype.itemsize >= 4}

    def of(name: str) -> torch.dtype:
        return torch.float32 if name in kept or is_wide(name) else dtype

    return of


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A copy on the host; floating-point values in this dtype, without -0.0.

    Raises Mistake for a value that is too large for the dtype, with the tensor's name.
    """
    if not value.is_floating_point():
        return value.cpu().clone()
    copied = value.detach().to("cpu", dtype, copy=True)
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(value.dtype).max and not copied.isfinite().all():
        host = value.detach().cpu()
        lost = host.isfinite() & ~copied.isfinite()
        if lost.any():
            raise Mistake(
                f"{name} has a value of {float(host[lost].abs().amax()):.6g}, and the largest of "
                f"{str(dtype).removeprefix('torch.')} is {limit:g}: export in bfloat16 or float32 (export.dtype)"
            )
    return copied.masked_fill_(copied == 0, 0.0)


def _tensors(model: torch.nn.Module, wanted: Any) -> dict[str, Tensor]:
    """Parameters, those that the family ties under their first name alone, and persistent buffers."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    again = {*tied, *tied.values()}  # transformers ties these when it loads them, and no others
    once = {name for name, _ in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {
        name: parameter.data
        for name, parameter in parameters.items()
        if wanted(name) and (name in once or name not in again)
    }
    stored = model.state_dict()
    return found | {name: value for name, value in stored.items() if name not in parameters and wanted(name)}
