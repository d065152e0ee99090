"""The files of a local checkpoint by their names; nothing here loads torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esparse.errors import Mistake

# In transformers' order of preference.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
DEQUANTISED = "a pruning needs weights in 16 or 32 bits: name the original model, or save a dequantised copy first"
POINTER = b"version https://git-lfs"


def shards_of(folder: Path) -> list[Path]:
    """The files of weights of a local checkpoint, which are all there.

    Raises FileNotFoundError or ValueError if it lacks one of its files, or holds something else than a model.
    """
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json", "merges.txt", *VOCABULARIES, *NAMES):
        _check_is_itself(folder / name)
    if (folder / "adapter_config.json").is_file():
        raise Mistake(adapter(str(folder), json_object(folder / "adapter_config.json")))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model directory: it has no config.json{_other_format(folder)}")
    json_object(folder / "config.json")
    entry = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if entry is None:
        raise FileNotFoundError(f"{folder} has no weights: neither *.safetensors nor *.bin{_other_format(folder)}")
    shards = [entry]
    if entry.name.endswith(".index.json"):
        try:
            shards = [folder / name for name in sorted(set(json_object(entry)["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError) as error:
            raise Mistake(f"{entry} is damaged: it is not the index of a checkpoint ({error!r})") from error
    for shard in shards:
        _check_is_itself(shard)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:3])} ({entry.name} names them)"
        )
    return shards


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises Mistake if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Mistake(f"{file} is damaged: it is no JSON ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise Mistake(f"{file} is damaged: expected one JSON object, got a {type(found).__name__}: copy it again")
    return found


def adapter(asked: str, config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path") or "its base model"
    return (
        f"{asked} holds an adapter ({config.get('peft_type', 'PEFT')}) of {base}: merge it into that model first "
        "(peft: merge_and_unload, then save_pretrained), and give the merged model"
    )


def check_config_of(folder: Path) -> None:
    """As `check_config`, of a local model; what else is wrong with its config.json is left to others."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(config, dict):
        check_config(str(folder), config)


def check_config(asked: str, config: Mapping[str, Any]) -> None:
    """Raises Mistake for weights that are quantised or packed, and for an encoder with a decoder.

    `asked`: the model's name.
    """
    if config.get("is_encoder_decoder") is True:
        kind = config.get("model_type") or "by its config.json"
        raise Mistake(f"{asked} is an encoder with a decoder ({kind}): esparse prunes decoder-only models")
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if not isinstance(part, Mapping):
            continue
        how = part.get("quantization_config") or part.get("compression_config")
        if not how:
            continue
        method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
        if method == "esparse":
            raise Mistake(
                f"{asked} is packed by esparse (export=packed) and is pruned already: give the original model, or an "
                "export=dense of it"
            )
        raise Mistake(f"{asked} is quantised ({method or 'by its config.json'}): {DEQUANTISED}")


def _check_is_itself(file: Path) -> None:
    """Raises FileNotFoundError for a link to nothing, and Mistake for a pointer of Git LFS; a file may be missing."""
    if file.is_symlink() and not file.exists():
        raise FileNotFoundError(
            f"{file} is a link to {file.readlink()}, where nothing is: a hub's cache keeps the files in its folder "
            "blobs, so copy what the links name (cp -rL), or fetch it again"
        )
    if not file.is_file():
        return
    with file.open("rb") as read:
        if read.read(len(POINTER)) == POINTER:
            raise Mistake(
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
    suffixes = sorted({file.suffix for file in folder.iterdir()} & set(known))
    below = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if suffixes:
        return f"; it holds {known[suffixes[0]]}"
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards and not (folder / "model.safetensors").exists():
        return f"; it has {shards[0]}, but neither model.safetensors nor model.safetensors.index.json that names it"
    return f"; a model lies in its folder {below[0]}: name that one" if below else ""
