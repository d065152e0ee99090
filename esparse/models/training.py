"""What every training of weights needs: gradients of some parameters only, and weights that stay in their mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def requiring_grad(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While open, of the module's parameters only these require gradients; afterwards each is as before."""
    wanted = {id(parameter) for parameter in parameters}
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


@contextmanager
def masked(kept: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """While open, a weight where its mask (True = survives, shaped as the parameter) is False has no gradient."""

    def without(gone: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda grad: grad.masked_fill(gone, 0.0)

    hooks = [parameter.register_hook(without(~keep.to(parameter.device))) for parameter, keep in kept.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """While open, the module computes in float32; afterwards each tensor is in its own precision again.

    What half precision rounds to zero is +0.0.
    """
    parameters = {parameter: parameter.dtype for parameter in module.parameters()}
    buffers = [(owner, name, value) for owner in module.modules() for name, value in owner.named_buffers(recurse=False)]
    try:
        module.float()
        yield
    finally:
        for parameter, dtype in parameters.items():
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
                parameter.data.masked_fill_(parameter.data == 0, 0.0)
        for owner, name, value in buffers:
            owner._buffers[name] = value
