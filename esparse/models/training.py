"""Tools for training weights: gradients of some parameters, weights that stay in their mask, undoing a training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esparse.errors import Mistake

log = logging.getLogger("esparse")

LEAST = 1e-3  # that a tensor of zeros, a bias for instance, can leave zero


def improved(
    name: str, parameters: Sequence[nn.Parameter], loss: Callable[[], float], train: Callable[[], int]
) -> tuple[float, float, int]:
    """Trains; restores the parameters if the loss has risen. Returns the loss before and after, and the steps.

    Keeps a copy of the parameters on the host. Raises Mistake if the loss is NaN or Inf before training.
    """
    before = loss()
    if not math.isfinite(before):
        raise Mistake(
            f"the training of {name} cannot begin: its loss is NaN or Inf; if the model is in float16, try "
            "model.dtype=bfloat16 or float32"
        )
    saved = [parameter.data.to("cpu", copy=True) for parameter in parameters]
    steps = train()
    after = loss()
    if after <= before:
        return before, after, steps
    log.warning("the training of %s raised its loss from %.4g to %.4g and was undone", name, before, after)  # or NaN
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.data.copy_(value)
    return before, before, steps


def rate(step: int, total: int, *, warm_up: float, decay: str = "linear", final: float = 0.0) -> float:
    """The factor of the learning rate at a step: it rises during a share of the steps, then falls to `final`."""
    rise = int(warm_up * total)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    fall = (1 + math.cos(math.pi * done)) / 2 if decay == "cosine" else 1 - done
    return final + (1 - final) * fall


def in_half(products: str, dtype: torch.dtype) -> bool:
    """Whether a training computes its products in bfloat16: with `auto`, if the model is in bfloat16.

    A model in float16 computes in float32, as its gradients would need a scale.
    """
    return products == "auto" and dtype == torch.bfloat16


def at_rate(parameters: Iterable[Tensor], learning_rate: float, *, scaled: bool) -> list[dict[str, Any]]:
    """Groups for an optimiser: the parameters at a learning rate or, if `scaled`, at a share of each one's size."""
    return [{"params": [p], "lr": learning_rate * (_size(p) if scaled else 1.0)} for p in parameters]


def _size(parameter: Tensor) -> float:
    """The root mean square of the values that are not zero, at least LEAST, as Adafactor takes it.

    Shazeer and Stern 2018, arXiv 1804.04235, section 8.
    """
    kept = max(int(parameter.count_nonzero()), 1)
    return max(float(parameter.detach().float().norm()) / math.sqrt(kept), LEAST)


@contextmanager
def requiring_grad(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While open, only these of the module's parameters require gradients; restores the flags on exit."""
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
    """While open, weights whose mask is False get no gradient; a mask (True = kept) has its parameter's shape."""

    def inside(keep: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda grad: torch.where(keep, grad, 0.0)

    hooks = [parameter.register_hook(inside(keep.to(parameter.device))) for parameter, keep in kept.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """While open, the module computes in float32; on exit each tensor gets its own dtype back.

    Values that half precision rounds to zero become +0.0; those of float64 that nothing changed keep all their digits.
    """
    parameters = {parameter: parameter.dtype for parameter in module.parameters()}
    finer = {parameter: parameter.data for parameter in parameters if parameter.dtype == torch.float64}
    buffers = [(owner, name, value) for owner in module.modules() for name, value in owner.named_buffers(recurse=False)]
    try:
        module.float()
        yield
    finally:
        for parameter, dtype in parameters.items():
            if parameter.dtype != dtype:
                now, before = parameter.data, finer.get(parameter)
                parameter.data = now.to(dtype)
                if before is not None:
                    parameter.data = torch.where(now == before.to(now), before.to(now.device), parameter.data)
                parameter.data.masked_fill_(parameter.data == 0, 0.0)
        for owner, name, value in buffers:
            owner._buffers[name] = value
