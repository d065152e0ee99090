"""Gradients of the dense weights on the calibration sequences, for the metrics that want them.

Both functions give, for every prunable parameter as it is stored, the mean over sequences of the squared gradient
(float32), and leave the model as it was. A gradient is squared and freed as soon as its matrix has it, so that the
gradients of a whole model never stand in memory at once.

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
    """Of the l2 norm of the block's output, sequence by sequence: Wanda++'s regional gradients (arXiv 2503.04992).

    Costs 4 bytes per weight of one block for the squares, and the block's activations on one sequence. The block's
    stream must hold one sequence per micro-batch.
    """
    parameters = block.matrices().parameters()
    sequences = len(block.activations.hidden)
    assert all(len(hidden_BLH) == 1 for hidden_BLH in block.activations.hidden)
    with requiring_grad(block.module, parameters.values()), _squared(parameters, sequences) as squares:
        for batch in range(sequences if parameters else 0):
            block.activations.forward(block.index, batch).float().norm().backward()
    return squares


def of_model(blocks: BlockModel, tokens_SL: Tensor, skip: Sequence[str] = ()) -> dict[str, Tensor]:
    """Of the language model's mean loss on each sequence (GBLM, arXiv 2311.04902); the squares lie on the host.

    Costs the whole model on the device, 4 bytes per prunable weight for the squares, so 13 GB + 26 GB for a 7B model in
    half precision, and the activations of all blocks on one sequence. Raises ValueError where that does not fit, and
    where a sequence has no second token to predict.
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
        # The loss is summed and the squares divided instead: in float16 the gradients of a mean would underflow.
        count = len(tokens_SL) * (length - 1) ** 2
        with requiring_grad(model, parameters.values()), _squared(parameters, count) as squares:
            for tokens_L in tokens_SL.to(blocks.device) if parameters else ():
                logits_LV = model(input_ids=tokens_L[None], use_cache=False).logits[0]
                cross_entropy(logits_LV[:-1].float(), tokens_L[1:], reduction="sum").backward()
    except torch.OutOfMemoryError as error:
        raise Mistake(
            f"the whole model and its squared gradients do not fit on {blocks.device}: use metric.source=block, which "
            "needs one block"
        ) from error
    finally:
        blocks.model.to(home)
    return {name: square.to(home) for name, square in squares.items()}


@contextmanager
def _squared(parameters: Mapping[str, nn.Parameter], count: int) -> Iterator[dict[str, Tensor]]:
    """While open, every backward pass adds its squared gradients, divided by `count`, to what this gives.

    A parameter that a pass did not reach (an expert without tokens) adds nothing.
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
