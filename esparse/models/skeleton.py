"""A model built again from its configuration, without weights: what transformers makes before it loads a checkpoint."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("esparse")
_building = threading.Lock()


def skeleton_of(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel | None:
    """The model on the meta device; None if it cannot be built so, where a model's own code fails."""
    try:
        with torch.device("meta"):
            built: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype or model.dtype)
    except Exception as error:
        log.debug("%s cannot be built without weights: %s", type(model).__name__, error)
        return None
    return built


@contextmanager
def empty_weights() -> Iterator[None]:
    """While open, parameters that this thread registers are on the meta device, and buffers are as usual.

    accelerate's `init_empty_weights` puts those of all threads there, and of two at once one leaves it so for good.
    """
    here = threading.get_ident()
    with _building:
        register = nn.Module.register_parameter

        def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None and threading.get_ident() == here:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

        nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
