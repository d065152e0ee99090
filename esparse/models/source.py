"""A model's original checkpoint: the files beside its weights, and tensors that the model does not load."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from esparse.models.checkpoint import Checkpoint, find, loaded_as, opened

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger("esparse")

# Files that belong to a model in any program: processors, templates, vocabularies, code, licences.
ENDINGS = {".json", ".jinja", ".model", ".tiktoken", ".bpe", ".spm", ".py"}
TEXTS = re.compile(
    r"(vocab|merges|bpe|dict)[^/]*\.txt$|(licen[cs]e|notice|copying|use_?policy|attribution|terms)[^/]*$", re.I
)
# Files that are not copied: written by the export itself, or left by training or quantisation.
OWN = {"config.json", "generation_config.json", "esparse.json", "README.md"}
NOT_OURS = re.compile(
    r"\.index\.json$|^(trainer_state|all_results|train_results|eval_results|adapter_config|quantize_config|quant_config"
    r"|hf_quant_config|training_args|ds_config|wandb-\w+)\b.*\.json$",
    re.I,
)
LARGEST = 2**28  # bytes of a file that is copied
FOLDERS = ("additional_chat_templates",)
# Buffers that older versions of transformers stored although models compute them.
OLD_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")


def folder_of(model: PreTrainedModel) -> Path | None:
    """The folder on this machine that the model was loaded from; None if there is none (any more)."""
    name, commit = model.name_or_path, getattr(model.config, "_commit_hash", None)
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():  # GGUF: files beside it belong to other models
        return None
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    with contextlib.suppress(Exception):  # the hub cannot be reached (errors of many types): the cache has to do
        endings = [f"*{ending}" for ending in sorted(ENDINGS)]
        snapshot_download(name, revision=commit, allow_patterns=[*endings, "*.txt", "*LICEN*", "*NOTICE*", "*POLICY*"])
    with contextlib.suppress(ValueError, OSError):
        cached = try_to_load_from_cache(name, "config.json", revision=commit)
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def files_beside(folder: Path) -> list[Path]:
    """The files that an export copies; logs other files that may belong to the model."""
    found: list[Path] = []
    left: list[str] = []
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            found += sorted(file.rglob("*.*")) if file.name in FOLDERS else []
            continue
        if file.name in OWN or file.name.startswith(".") or NOT_OURS.search(file.name) or _holds_weights(file):
            continue
        belongs = file.suffix.lower() in ENDINGS or TEXTS.search(file.name)
        if belongs and file.stat().st_size <= LARGEST:
            found.append(file)
        else:
            left.append(file.name)
    if left:
        log.info("files beside the model that are not copied into the export: %s", ", ".join(left))
    return found


def _holds_weights(file: Path) -> bool:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".pkl")
    return file.suffix.lower() in weights


def not_loaded(model: PreTrainedModel) -> tuple[Checkpoint | None, list[str]]:
    """The model's original checkpoint, and the names of its tensors that the model does not load.

    For example draft layers for predicting several tokens, or the vision tower beside a text model. The checkpoint is
    None if there is none that can be read tensor by tensor.
    """
    name = model.name_or_path
    commit = getattr(model.config, "_commit_hash", None)
    try:
        entry = find(name, revision=commit) if name and not Path(name).is_file() else None
        checkpoint = None if entry is None else Checkpoint(entry)
        names = [] if checkpoint is None else sorted(checkpoint.files)
    except (OSError, ValueError):
        return None, []
    as_loaded, state = loaded_as(model), model.state_dict()
    return checkpoint, [n for n in names if not OLD_BUFFERS.search(n) and state.keys().isdisjoint(as_loaded(n))]


def say_not_loaded(model: PreTrainedModel) -> None:
    """Logs a warning about tensors in the checkpoint that the model does not load."""
    _, names = not_loaded(model)
    if names:
        log.warning(
            "%s has no place for %d tensors of its checkpoint (%s%s): they take no part in the run, and exports carry "
            "them along as they are",
            type(model).__name__,
            len(names),
            ", ".join(names[:3]),
            ", ..." if len(names) > 3 else "",
        )


def tensors(checkpoint: Checkpoint, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields these tensors of a checkpoint, file by file."""
    for file in dict.fromkeys(checkpoint.files[name] for name in names):
        with opened(file) as read:
            for name in names:
                if checkpoint.files[name] == file:
                    yield name, read(name)
