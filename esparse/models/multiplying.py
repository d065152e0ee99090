"""Whether a layer multiplies its inputs by its weight, as every Linear seems to; some subclasses do something else.

Shapes: T tokens, O outputs, I inputs.
"""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

PLAIN = (nn.Linear.forward, Conv1D.forward)
TOKENS = (2, 3)  # of the trial: two sequences
ALIKE = 0.5  # cosine; a layer that scales or rounds its weight still multiplies by it

_tried: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def multiplies(layer: nn.Module) -> bool:
    """Whether the layer's class returns, for tokens, about the product with its weight.

    DeepSeek-V4 has a Linear that gives each group of rows other inputs: statistics of its inputs would mix them, and a
    packed layer would not do that. A class is tried once, with random weights; a replaced forward of a single layer is
    not seen.
    """
    kind = type(layer)
    if kind.forward in PLAIN:
        return True
    if kind not in _tried:
        _tried[kind] = _try(layer)
    return _tried[kind]


@torch.no_grad()
def _try(layer: nn.Module) -> bool:
    weight = layer.get_parameter("weight")
    inputs = weight.shape[0] if isinstance(layer, Conv1D) else weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    stand_in = copy.copy(layer)
    with torch.device("cpu"), torch.inference_mode(False):
        known = torch.randn(weight.shape, generator=generator)
        x_TI = torch.randn(*TOKENS, inputs, generator=generator)
        product_TO = x_TI @ (known if isinstance(layer, Conv1D) else known.T)
        parameters = {"weight": nn.Parameter(known, requires_grad=False)}
        if layer._parameters.get("bias") is not None:
            parameters["bias"] = nn.Parameter(torch.zeros(product_TO.shape[-1]), requires_grad=False)
        stand_in.__dict__["_parameters"] = dict(layer._parameters) | parameters
        try:
            out = type(layer).forward(stand_in, x_TI)
        except Exception:  # one that takes inputs of other shapes raises any type
            return False
        if not isinstance(out, torch.Tensor) or out.shape != product_TO.shape:
            return False
        return float(torch.cosine_similarity(out.float().flatten(), product_TO.flatten(), dim=0)) > ALIKE
