"""The tokens that a model in memory was calibrated on, kept with the model; a loaded checkpoint has none.

Shapes: S sequences, W windows, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esparse.data.overlap import warn_if_shared

NAME = "_esparse_calibration"  # the attribute: it goes with the model, also into copies of it


def remember(model: nn.Module, tokens_SL: Tensor) -> None:
    """Keeps the tokens beside those of earlier calls."""
    known = _of(model)
    if not any(torch.equal(tokens_SL, earlier_SL) for earlier_SL in known):
        setattr(model, NAME, (*known, tokens_SL))


def warn_if_calibrated_on(model: nn.Module, asked: Any, windows_WL: Tensor) -> None:
    """Logs a warning if much of these windows is what the model was calibrated on, or the other way round."""
    for tokens_SL in _of(model):
        warn_if_shared(_named(asked), tokens_SL, windows_WL)


def _of(model: nn.Module) -> tuple[Tensor, ...]:
    known: tuple[Tensor, ...] = vars(model).get(NAME, ())
    return known


def _named(asked: Any) -> str:
    if isinstance(asked, Tensor):
        return "given as tokens"
    corpora = getattr(asked, "corpora", None)  # of a part with settings of its own
    if corpora is not None:
        return ", ".join(map(str, corpora))
    return "given as texts" if isinstance(asked, list | tuple) else str(asked)
