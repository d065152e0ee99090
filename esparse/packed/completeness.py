"""Whether the files of a packed checkpoint hold the tensors that its config.json asks for, and no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from esparse.errors import Mistake

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from esparse.packed.quantizer import EsparseConfig

# Of the names of tensors that only packed checkpoints have.
ENDINGS = {"values", "index", "codes", "scales", "zeros", "salient_values", "salient_index", "salient_codes"}
ENDINGS |= {"order", "input_order", "output_order"}


def check_tensors(model: PreTrainedModel, config: EsparseConfig, files: Sequence[Path]) -> None:
    """Raises Mistake if the files and the packed layers differ in what is stored, or in its shape.

    transformers would fill what is missing with anything, and leave out what is too much.
    """
    stored: dict[str, Path] = {}
    packed = [*config.layers, *config.experts]
    shapes = {f"{n}.{own}": list(v.shape) for n in packed for own, v in model.get_submodule(n).state_dict().items()}
    for path in files:
        with safe_open(path, "pt") as file:
            stored |= dict.fromkeys(file.keys(), path)
            for name in (name for name in file.keys() if name in shapes):  # noqa: SIM118 - it is no mapping
                if (found := file.get_slice(name).get_shape()) != shapes[name]:
                    raise Mistake(
                        f"{path} has {name} of the shape {found}, and config.json asks for {shapes[name]}: one of them "
                        "is damaged, or of another model"
                    )
    wanted = set(shapes)
    wanted |= {f"{name}.output_order" for name in config.behind} | {f"{name}.input_order" for name in config.before}
    # Biases alone are stored by the names of the family's checkpoints, which may begin otherwise.
    ends = {_from_block(name) for name in stored if name.endswith(".bias")}
    for name in sorted(wanted - set(stored)):
        if not (name.endswith(".bias") and _from_block(name) in ends):
            raise Mistake(f"the checkpoint has no {name}, which its config.json asks for: one of them is damaged")
    modules, own = {name for name, _ in model.named_modules()}, set(model.state_dict())
    for name, path in stored.items():
        owner, _, ending = name.rpartition(".")
        if ending in ENDINGS and owner in modules | own and name not in own:
            raise Mistake(f"{path} has {name}, of which its config.json says nothing: one of them is damaged")


def _from_block(name: str) -> str:
    """A tensor's name from the number of its block on."""
    return name[found.start() :] if (found := re.search(r"\b\d+\.", name)) else name
