"""Checks that a model's files can be pruned; refuses them in one sentence before anything large is read."""

from __future__ import annotations

import json
from pathlib import Path

from esparse.errors import Mistake
from esparse.models.model_files import DEQUANTISED, adapter, shards_of

PLAIN = {"F64", "F32", "F16", "BF16"}  # dtypes of unquantised weights, by safetensors' names


def check_files(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError if a local checkpoint lacks a file, or a shard of it is cut short.

    Reads only files that would be loaded.
    """
    from safetensors import SafetensorError, safe_open

    for shard in shards_of(folder):
        if shard.suffix != ".safetensors":
            continue
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    kind = file.get_slice(name).get_dtype() if name.endswith(("weight", "weight_packed")) else "F32"
                    if kind not in PLAIN:
                        raise Mistake(f"{shard} holds quantised weights ({name} is {kind}): {DEQUANTISED}")
        except SafetensorError as error:
            raise Mistake(
                f"{shard} is damaged or cut short ({shard.stat().st_size:,} bytes; {error}): copy it again"
            ) from error


def check_hub(path: str, revision: str | None) -> None:
    """`check_files` for a hub model: raises ValueError if the repository holds an adapter and no model."""
    from transformers.utils.hub import cached_file

    asked = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    asked |= {"_raise_exceptions_for_connection_errors": False, "_raise_exceptions_for_gated_repo": False}
    if cached_file(path, "config.json", **asked) is None:
        file = cached_file(path, "adapter_config.json", **asked)
        if file is not None:
            raise Mistake(adapter(path, json.loads(Path(file).read_text())))
