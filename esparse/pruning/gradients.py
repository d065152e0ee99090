"""Gradients of the dense weights on the calibration sequences, for metrics that need them.

Both functions return, for every prunable parameter in its own layout, the mean over sequences of the squared gradient
(float32), and do not change the model. Each gradient is squared and freed at once, so that the gradients of a whole
model are never in memory together.

Shapes: S sequences, L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esparse.errors import Mistake
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.matrices import BlockMatrices
from esparse.models.training import requiring_grad


def of_block(block: Block) -> dict[str, Tensor]:
    """Gradients of the l2 norm of the block's output, per sequence: Wanda++'s regional gradients (arXiv 2503.04992).

    Takes 4 bytes per weight of one block for the squares, and the block's activations for one sequence. The block's
    stream must have one sequence per micro-batch.
    """
    parameters = block.matrices().parameters()
    sequences = len(block.activations.hidden)
    assert all(at_once == 1 for at_once, _ in block.activations.shapes)
    with requiring_grad(block.module, parameters.values()), _squared(parameters, sequences) as squares:
        for batch in range(sequences if parameters else 0):
            block.activations.forward(block.index, batch).float().norm().backward()
    return squares


def of_model(blocks: BlockModel, tokens_SL: Tensor, skip: Sequence[str] = ()) -> dict[str, Tensor]:
    """Gradients of the model's mean loss on each sequence (GBLM, arXiv 2311.04902); the squares are on the host.

    Needs the whole model on the device, 4 bytes per prunable weight for the squares (13 GB + 26 GB for a 7B model in
    half precision), and the activations of all blocks for one sequence. Raises Mistake if that does not fit, and if
    sequences have only one token.
    """
    length = tokens_SL.shape[1]
    if length < 2:
        raise Mistake(f"the gradient of the loss needs calibration.length of at least 2 tokens, got {length}")
    parameters: dict[str, nn.Parameter] = {}
    for index, block in enumerate(blocks.blocks):
        parameters |= BlockMatrices(block, f"{blocks.prefix}.{index}", skip).parameters()
    home = next(blocks.model.parameters()).device
    try:
        model = blocks.model.to(blocks.device)
        # Sums the loss and divides the squares, because in float16 the gradients of a mean would underflow.
        count = len(tokens_SL) * (length - 1) ** 2
        with requiring_grad(model, parameters.values()), _squared(parameters, count) as squares:
            for tokens_L in tokens_SL.to(blocks.device) if parameters else ():
                logits_LV = model(input_ids=tokens_L[None], use_cache=False).logits[0]
                cross_entropy(logits_LV[:-1].float(), tokens_L[1:], reduction="sum").backward()
    except torch.OutOfMemoryError as error:
        raise Mistake(
            f"the whole model and its squared gradients do not fit on {blocks.device}: use metric.source=block, which "
            "needs only one block"
        ) from error
    finally:
        blocks.model.to(home)
    return {name: square.to(home) for name, square in squares.items()}


@contextmanager
def _squared(parameters: Mapping[str, nn.Parameter], count: int) -> Iterator[dict[str, Tensor]]:
    """While open, every backward pass adds its squared gradients, divided by `count`, to the yielded tensors.

    A pass adds nothing for parameters that it did not reach (experts without tokens).
    """
    squares = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}

    def take(parameter: Tensor, square: Tensor) -> None:
        assert parameter.grad is not None
        grad = parameter.grad.float()
        square.addcmul_(grad, grad, value=1 / count)
        parameter.grad = None

    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p, square=squares[name]: take(p, square))
        for name, parameter in parameters.items()
    ]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()
