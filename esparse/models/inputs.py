"""Checks that a model's files can be pruned; refuses them in one sentence before anything large is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esparse.errors import Mistake
from esparse.models.model_files import adapter, check_decoder_only, shards_of

PLAIN = {"F64", "F32", "F16", "BF16"}  # dtypes of unquantised weights, by safetensors' names
DEQUANTISED = "a pruning needs weights in 16 or 32 bits: name the original model, or save a dequantised copy first"


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


def check_config(asked: str, config: Mapping[str, Any]) -> None:
    """Raises Mistake for weights that are quantised or packed, and for an encoder with a decoder."""
    check_decoder_only(asked, config)
    for part in (config, config.get("text_config") or {}, config.get("llm_config") or {}):
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


def check_hub(path: str, revision: str | None) -> None:
    """`check_files` for a hub model: raises ValueError if the repository holds an adapter and no model."""
    from transformers.utils.hub import cached_file

    asked = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    asked |= {"_raise_exceptions_for_connection_errors": False, "_raise_exceptions_for_gated_repo": False}
    if cached_file(path, "config.json", **asked) is None:
        file = cached_file(path, "adapter_config.json", **asked)
        if file is not None:
            raise Mistake(adapter(path, json.loads(Path(file).read_text())))
