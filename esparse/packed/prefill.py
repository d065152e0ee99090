"""Computes many tokens at once on sparse tensor cores, from a second copy of the packed weights, if memory allows.

A packed layer computes up to 16 tokens from its one copy; for more tokens it makes the weight dense for the time of the
call. cuSPARSELt needs a format of its own. If that format begins with the packed values (which is compared, not
assumed), it takes 1/16 of the dense bytes for 2:4 in 16 bits, else 9/16 (esparse/kernels/linear.py).
"""

from __future__ import annotations

import torch
from torch import nn

from esparse.errors import Mistake
from esparse.kernels.linear import why_not_cusparselt
from esparse.packed.layer import PackedLinear
from esparse.packed.quantised_layer import QuantisedLinear


def use_sparse_cores(model: nn.Module, on: bool = True) -> dict[str, str]:
    """Switches sparse tensor cores on or off for products of more than 16 tokens in the model's packed layers.

    A layer builds its second copy at its first such call (make that call before you capture a CUDA graph), and again
    after it was moved. Returns the layers that cannot use them, each with the reason; raises Mistake if none can.
    """
    layers = _layers(model)
    left = {name: why for name, layer in layers.items() if (why := _why_not(layer)) is not None} if on else {}
    if len(left) == len(layers) and on:
        raise Mistake(next((f"{name}: {why}" for name, why in left.items()), "the model has no packed layer"))
    for name, layer in layers.items():
        layer.use_sparse_cores(on and name not in left)
    return left


def second_copy_bytes(model: nn.Module) -> int:
    """Bytes that the second copies take now, beyond the packed weights."""
    return sum(layer.second_copy_bytes() for layer in _layers(model).values())


def _layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _why_not(layer: PackedLinear) -> str | None:
    if isinstance(layer, QuantisedLinear):
        return f"its values are codes of {layer.grid.code_bits} bits, which sparse tensor cores do not take"
    if not layer.for_kernels:
        return "its groups do not stand side by side: sparse tensor cores take export.order=physical without outliers"
    (nm,) = layer.pattern.parts()
    shape, dtype = (layer.out_features, layer.in_features), layer.values.dtype
    return why_not_cusparselt(*shape, n=nm.n, m=nm.m, dtype=dtype) or _why_not_on(layer.values.device)


def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it is on {device}: move the model to a GPU first"
    if not torch.backends.cusparselt.is_available():
        return "this PyTorch comes without cuSPARSELt"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no sparse tensor cores"
    return None
