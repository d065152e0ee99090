"""Checks that a model's files can be pruned; refuses them in one sentence before anything large is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esparse.models.checkpoint import find

PLAIN = {"F64", "F32", "F16", "BF16"}  # dtypes of unquantised weights, by safetensors' names
DEQUANTISED = "a pruning needs weights in 16 or 32 bits: name the original model, or save a dequantised copy first"
POINTER = b"version https://git-lfs"


def check_files(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError if a local checkpoint lacks a file, or a shard of it is cut short.

    Reads only files that would be loaded.
    """
    from safetensors import SafetensorError, safe_open

    if (folder / "adapter_config.json").is_file():
        raise ValueError(_adapter(str(folder), json.loads((folder / "adapter_config.json").read_text())))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model directory: it has no config.json{_other_format(folder)}")
    _check_no_pointer(folder / "config.json")
    entry = find(str(folder))
    if entry is None:
        raise FileNotFoundError(f"{folder} has no weights: neither *.safetensors nor *.bin{_other_format(folder)}")
    shards = [entry]
    if entry.name.endswith(".index.json"):
        _check_no_pointer(entry)
        try:
            shards = [folder / name for name in sorted(set(json.loads(entry.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{entry} is damaged: it is not the index of a checkpoint ({error!r})") from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:3])} ({entry.name} names them)"
        )
    for shard in shards:
        _check_no_pointer(shard)
        if shard.suffix != ".safetensors":
            continue
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    kind = file.get_slice(name).get_dtype() if name.endswith(("weight", "weight_packed")) else "F32"
                    if kind not in PLAIN:
                        raise ValueError(f"{shard} holds quantised weights ({name} is {kind}): {DEQUANTISED}")
        except SafetensorError as error:
            raise ValueError(
                f"{shard} is damaged or cut short ({shard.stat().st_size:,} bytes; {error}): copy it again"
            ) from error


def check_config(asked: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError if config.json says that the weights are quantised or packed; `asked`: the model's name."""
    for part in (config, config.get("text_config") or {}, config.get("llm_config") or {}):
        how = part.get("quantization_config") or part.get("compression_config")
        if not how:
            continue
        method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
        if method == "esparse":
            raise ValueError(
                f"{asked} is packed by esparse (export=packed) and is pruned already: give the original model, or an "
                "export=dense of it"
            )
        raise ValueError(f"{asked} is quantised ({method or 'by its config.json'}): {DEQUANTISED}")


def check_hub(path: str, revision: str | None) -> None:
    """`check_files` for a hub model: raises ValueError if the repository holds an adapter and no model."""
    from transformers.utils.hub import cached_file

    asked = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    asked |= {"_raise_exceptions_for_connection_errors": False, "_raise_exceptions_for_gated_repo": False}
    if cached_file(path, "config.json", **asked) is None:
        adapter = cached_file(path, "adapter_config.json", **asked)
        if adapter is not None:
            raise ValueError(_adapter(path, json.loads(Path(adapter).read_text())))


def _adapter(asked: str, config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path") or "its base model"
    return (
        f"{asked} holds an adapter ({config.get('peft_type', 'PEFT')}) of {base}: merge it into that model first "
        "(peft: merge_and_unload, then save_pretrained), and give the merged model"
    )


def _check_no_pointer(file: Path) -> None:
    with file.open("rb") as read:
        if read.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{file} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull` or `hf download`"
            )


def _other_format(folder: Path) -> str:
    """Names files of other formats in the folder, as a hint for the user."""
    known = {
        ".gguf": "a GGUF file: name the file itself, model.path=FILE.gguf",
        ".pth": "weights in the format of the authors' own code (*.pth): give the Hugging Face version of the model",
        ".h5": "weights of TensorFlow: give the PyTorch version of the model",
        ".msgpack": "weights of Flax: give the PyTorch version of the model",
        ".onnx": "weights in ONNX: give the PyTorch version of the model",
    }
    there = sorted({file.suffix for file in folder.iterdir()} & set(known))
    below = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if there:
        return f"; it holds {known[there[0]]}"
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards and not (folder / "model.safetensors").exists():
        return f"; it has {shards[0]}, but neither model.safetensors nor model.safetensors.index.json that names it"
    return f"; a model lies in its folder {below[0]}: name that one" if below else ""
