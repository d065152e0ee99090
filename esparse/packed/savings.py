"""What n:m saves of a model, from its configuration: `python -m esparse.packed.memory` prints the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from esparse import patterns
from esparse.models.library_errors import explained
from esparse.models.load import BUILTIN, published_config
from esparse.models.matrices import BlockMatrices
from esparse.models.model_name import check_absent
from esparse.models.model_parts import find_blocks
from esparse.packed.sizes import META, Saving, of_codes, of_matrix
from esparse.parts import numbers
from esparse.patterns import Pattern
from esparse.quantise.grids import Grid
from esparse.records.groups import ANY, GROUPS

# Per cent saved by 2:4 on LLaMA, as E-Sparse publishes it (arXiv 2310.15929, abstract: 42.64 % to 43.52 %).
PUBLISHED = {"llama-7b": 42.64, "llama-65b": 43.52}


def of_model(
    config: PretrainedConfig, pattern: Pattern, dtype: torch.dtype = torch.float16, grid: Grid | None = None
) -> Saving:
    """Bytes of a whole model: all decoder layers and experts packed, embeddings, norms and head dense."""
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    total = sum(parameter.nbytes for parameter in model.parameters())
    saving = Saving(total, total, total)
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        matrices = BlockMatrices(block, f"{prefix}.{index}")
        packed = [_of_matrix(pattern, list(layer.view().shape), dtype, grid) for layer in matrices.layers()]
        # Only a forward pass shows which side of an expert is its input; that matters for a tail of the groups only.
        experts = [parameter.shape for parameter in matrices.parameters().values() if parameter.ndim == 3]
        packed += [_of_matrix(pattern, list(shape[1:]), dtype, grid) * shape[0] for shape in experts]
        for part in packed:
            saving += Saving(0, part.in_memory - part.dense, part.on_disk - part.dense)
    return saving


def as_published(config: PretrainedConfig, pattern: Pattern, dtype: torch.dtype = torch.float16) -> Saving:
    """Bytes as E-Sparse counts them, with too few matrices; see the top of the module."""
    width, inner = config.hidden_size, config.intermediate_size
    block = of_matrix(pattern, width, width, dtype) * 4
    block += of_matrix(pattern, inner, width, dtype) + of_matrix(pattern, width, inner, dtype)
    embedding = nn.Embedding(config.vocab_size, width, dtype=dtype, device=META).weight.nbytes
    return block * config.num_hidden_layers + Saving(embedding, embedding, embedding)


def table(
    models: dict[str, PretrainedConfig], asked: Sequence[str], grids: Mapping[str, Grid | None] | None = None
) -> list[list[str]]:
    """A header, and one row per model, pattern and grid (by its name; None: values of 16 bits)."""
    header = [
        "model",
        "pattern",
        *(["quantise"] if grids else []),
        "dense",
        "in memory",
        "saved",
        "on disk",
        "saved",
        "counted as published",
        "published",
    ]
    rows = [header]
    for name, config in models.items():
        for text, (quantise, grid) in product(asked, (grids or {"none": None}).items()):
            pattern = patterns.from_str(text)
            if grid is None and not pattern.parts():
                continue  # 16 bits of every weight are not packed
            whole = of_model(config, pattern, grid=grid)
            llama = config.model_type == "llama" and grid is None
            counted = as_published(config, pattern).share_in_memory if llama else None
            published = PUBLISHED.get(name) if text == "2:4" else None
            rows.append(
                [
                    name,
                    text,
                    *([quantise] if grids else []),
                    _gb(whole.dense),
                    _gb(whole.in_memory),
                    _percent(whole.share_in_memory),
                    _gb(whole.on_disk),
                    _percent(whole.share_on_disk),
                    "" if counted is None else _percent(counted),
                    "" if published is None else f"{published:.2f} %",
                ]
            )
    return rows


def config_of(name: str) -> PretrainedConfig:
    """Raises OSError or ValueError for a name under which there is no configuration.

    `name`: a directory, a name on the hub, or an option of the command line (llama-7b).
    """
    if name in numbers.names("model") and not Path(name).exists():
        model, _ = numbers.option("model", name, lambda group, _: GROUPS[group].component(ANY), outside=numbers.usual())
        name = str(BUILTIN) if model.path == "builtin" else model.path
    published, place = published_config(name), Path(name).expanduser()
    if published is None and not place.exists():
        check_absent(name, "the model")
    try:
        # False, as by default transformers asks whether to run a model's own code, and waits for the answer.
        where = str(place) if place.exists() else name
        return published or AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise explained(
            name,
            place.exists(),
            error,
            with_code="the bytes of such a model cannot be counted from its configuration",
            offline="copy its config.json into a directory here, and name that in place of it",
        ) from error


def _of_matrix(pattern: Pattern, shape: Sequence[int], dtype: torch.dtype, grid: Grid | None) -> Saving:
    outputs, inputs = shape
    if grid is None:
        return of_matrix(pattern, outputs, inputs, dtype)
    return of_codes(pattern, outputs, inputs, dtype, grid)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e9:.2g} GB"  # no model takes 0.00 GB


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
