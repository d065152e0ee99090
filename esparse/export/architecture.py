"""Whether an export is loaded as the model that was written: with what transformers builds from its config.json.

A parameter that it builds without is dropped when the checkpoint is loaded, and one that it builds in addition gets
random numbers, both with no more than a warning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esparse.errors import Mistake
from esparse.models.matrices import BlockMatrices, Matrix
from esparse.models.skeleton import skeleton_of

if TYPE_CHECKING:
    from torch import nn

    from esparse.models.blocks import BlockModel
    from esparse.recoveries import Recovery


def check_architecture(blocks: BlockModel, recovery: Recovery, *, biases: bool) -> None:
    """Raises Mistake if transformers builds the model with other parameters; `biases`: its layers may have more.

    A model that cannot be built without weights, as its own code may be, is taken as it is.
    """
    kind = type(blocks.model).__name__
    skeleton = skeleton_of(blocks.model)
    own = _names(blocks.model)
    built = own if skeleton is None else _names(skeleton)
    of_layers = [f"{layer.name}.bias" for layer in _layers(blocks)]
    without = [] if biases or not recovery.adds_biases() else [name for name in of_layers if name not in built]
    if without:
        raise Mistake(
            f"the recovery gives biases to layers that have none ({without[0].removesuffix('.bias')}, ...), and an "
            f"ordinary checkpoint of {kind} has no place for them: use export=packed"
        )
    dropped, made_up = sorted(own - built - set(of_layers if biases else ())), sorted(built - own)
    shapes = {} if skeleton is None else _shapes(skeleton)
    for name, here in _shapes(blocks.model).items():
        if here != (there := shapes.get(name, here)):
            raise Mistake(
                f"{name} has the shape {here}: transformers builds {kind} with {there} from the model's "
                "configuration, which must be changed with the model"
            )
    if dropped:
        raise Mistake(
            f"a checkpoint has no place for {dropped[0]}: transformers builds {kind} without it from the model's "
            "configuration, which must be changed with the model"
        )
    if made_up:
        raise Mistake(
            f"the model has no {made_up[0]}: transformers builds {kind} with it from the model's configuration, which "
            "must be changed with the model, and would fill it with random numbers"
        )


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}


def _layers(blocks: BlockModel) -> list[Matrix]:
    found = (BlockMatrices(block, f"{blocks.prefix}.{i}").layers() for i, block in enumerate(blocks.blocks))
    return [matrix for of_block in found for matrix in of_block if matrix.layer is not None]
