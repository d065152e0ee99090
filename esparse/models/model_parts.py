"""Finds parts of a model without running it: decoder blocks, parameters, configurations of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from esparse.models.calls import UnsupportedModel


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks: the best guess without running the model."""
    return next(iter(candidates(model).items()))


def candidates(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Lists of modules that may be the decoder blocks, by name, the likeliest first.

    They are the lists with one entry per hidden layer of the config, the outermost first, then the list that holds
    most of the weights. Raises UnsupportedModel if there is none.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    text = model.config.get_text_config
    expected = {int(getattr(config, "num_hidden_layers", None) or 0) for config in (text(), text(decoder=True))}
    fitting = [name for name, blocks in lists.items() if len(blocks) in expected]
    found = sorted(fitting, key=lambda name: name.count("."))
    sizes = {name: sum(p.numel() for p in blocks.parameters()) for name, blocks in lists.items()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    total = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    largest = [name for name, size in sizes.items() if size == max(sizes.values()) and size >= total / 2]
    if not found + largest:
        raise UnsupportedModel(
            f"no list of {' or '.join(map(str, sorted(expected)))} decoder blocks in {type(model).__name__} "
            f"(lists found: {', '.join(f'{name} of {len(blocks)}' for name, blocks in lists.items()) or 'none'}); "
            "esparse prunes decoder-only language models"
        )
    return {name: lists[name] for name in dict.fromkeys(found + largest)}


def shared_matrices(blocks: Mapping[str, nn.Module]) -> dict[str, str]:
    """Matrices of the blocks (by their names) that have several names: each further name, with the first one."""
    first: dict[int, str] = {}
    further = {}
    for name, block in blocks.items():
        for path, parameter in block.named_parameters(remove_duplicate=False):
            entry = f"{name}.{path}"
            if parameter.ndim > 1 and (known := first.setdefault(id(parameter), entry)) != entry:
                further[entry] = known
    return further


def own_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The modules' own parameters by name, each once."""
    named = {
        parameter: f"{path}.{name}".lstrip(".")
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    return {name: parameter for parameter, name in named.items()}


def expert_configs(model: PreTrainedModel) -> list[Any]:
    """All configurations (of the model, its parts and modules inside) that set how experts are computed."""
    configs = [model.config, *(getattr(module, "config", None) for module in model.modules())]
    return list({id(c): c for c in configs if hasattr(c, "_experts_implementation_internal")}.values())
