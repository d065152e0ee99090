"""A model built again from its configuration, without weights: what transformers makes before it loads a checkpoint."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("esparse")


def skeleton_of(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel | None:
    """The model on the meta device; None if it cannot be built so, where a model's own code fails."""
    try:
        with torch.device("meta"):
            built: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype or model.dtype)
    except Exception as error:
        log.debug("%s cannot be built without weights: %s", type(model).__name__, error)
        return None
    return built
