"""The names in a local checkpoint's blocks, read from the headers of its files; nothing here loads torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

# Families whose files name every weight as the model does. transformers renames those of others when it loads them.
AS_IN_FILES = (
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
    "starcoder2",
)
LONGEST = 2**27  # bytes of a header: a length beyond it is that of a damaged file


def names_in_blocks(folder: Path) -> list[str] | None:
    """The names of weights and layers inside the decoder blocks; None if the model might have others."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") not in AS_IN_FILES or "quantization_config" in config or "auto_map" in config:
            return None
        index = folder / "model.safetensors.index.json"
        if (file := folder / "model.safetensors").is_file():
            stored = _header(file)
        elif index.is_file():
            stored = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        else:
            return None
    except (OSError, ValueError, KeyError, AttributeError):  # a damaged file: its reader says what is wrong with it
        return None
    # A file that was saved from the model without its head lacks the first part of the names.
    weights = [name if name.startswith("model.") else f"model.{name}" for name in stored]
    inside = [name for name in weights if re.match(r"model\.layers\.\d+\.", name)]
    return sorted({part for name in inside for part in with_layers(name, 3)}) or None


def with_layers(name: str, least: int) -> list[str]:
    """A weight's name, and those of the modules that it lies in, of at least so many parts."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(least, len(parts) + 1)]


def found_in(expressions: Iterable[str], weight: str, least: int) -> bool:
    """Whether a regular expression is found in a weight's name, or in that of a module that `with_layers` gives."""
    return any(re.search(expression, name) for name in with_layers(weight, least) for expression in expressions)


def _header(file: Path) -> list[str]:
    with file.open("rb") as read:
        length = int.from_bytes(read.read(8), "little")
        if length > LONGEST:
            raise ValueError(f"{file} has no header")
        return [name for name in json.loads(read.read(length)) if name != "__metadata__"]
