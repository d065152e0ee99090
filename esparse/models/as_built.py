"""Whether a model in memory computes what transformers builds from its configuration and loads its weights into.

A checkpoint holds weights and a configuration. Replaced forwards, hooks, modules of other classes and changed
attributes are not in it: the model that is loaded from it is then another one than was pruned and measured.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_torch
from transformers import PreTrainedModel

from esparse.models.forward_check import gap, rounding, unmasked
from esparse.models.skeleton import empty_weights

log = logging.getLogger("esparse")

SEQUENCES, TOKENS = 2, 32  # of the comparison
SMALL, STEPS = 1e-3, 8  # of the largest logit, and of its precision: kernels that round elsewhere change less
NAMED = 3  # modules in a sentence
LIBRARIES = ("transformers", "torch")


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the logits are apart, as a share of the largest (None: not known), and what may cause it."""

    share: float | None
    causes: list[str]
    is_large: bool = False  # whether it is more than compiled kernels, which round elsewhere, change

    def __str__(self) -> str:
        causes = ", ".join(self.causes[:NAMED]) + (f" and {len(self.causes) - NAMED} more" * (len(self.causes) > NAMED))
        far = "" if self.share is None else f" (logits differ by {self.share:.2g} of the largest)"
        return f"{causes or 'attributes or buffers of its modules were changed'}{far}"


@torch.no_grad()
def difference(model: PreTrainedModel, tokens_SL: Tensor) -> Difference | None:
    """What a checkpoint of the model would not have; None if the loaded model computes the same on a few tokens.

    The model must be in evaluation mode. It is not changed, and its weights are not copied.
    """
    causes = _of_classes(model)
    patched = Difference(None, causes) if causes else None
    twin = _twin(model)
    own = _own(model, twin)
    tokens_BL = tokens_SL[:SEQUENCES, :TOKENS].to(model.device)
    try:
        here_BLV = _logits(model, tokens_BL)
    except Exception:  # pruning will say what is wrong with the model
        return patched
    there_BLV = None
    if twin is not None:
        try:
            with _Unhooked():
                there_BLV = _logits(twin, tokens_BL)
        except Exception as error:  # such as a model that relies on what was changed
            log.debug("%s as it is built from its configuration does not run: %s", type(model).__name__, error)
    if there_BLV is None:
        return Difference(None, causes + own) if own else patched
    if not bool(torch.isfinite(here_BLV).all()):
        return patched
    distance = gap(here_BLV, there_BLV)
    if distance <= rounding(here_BLV) or distance <= 4 * gap(_logits(model, tokens_BL), here_BLV):
        if own:
            log.info("%s: a checkpoint does not have that, and without it the logits are the same", ", ".join(own))
        return patched
    share = distance / float(here_BLV.abs().max())
    bar = max(SMALL, STEPS * torch.finfo(here_BLV.dtype).eps)
    return Difference(share, causes + own + _of_buffers(model, twin), share > bar)


def _logits(model: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
    return unmasked(model(input_ids=tokens_BL, use_cache=False).logits)


class _Unhooked:
    """While open, hooks that were registered for all modules of this process are not called."""

    def __enter__(self) -> None:
        self._held = {kind: dict(hooks) for kind, hooks in _global_hooks().items()}
        for hooks in _global_hooks().values():
            hooks.clear()

    def __exit__(self, *_: Any) -> None:
        for kind, hooks in _global_hooks().items():
            hooks.update(self._held[kind])


def _global_hooks() -> dict[str, dict[int, Any]]:
    kinds = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return {kind: getattr(of_torch, kind) for kind in kinds}


def _twin(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model as it is built from its configuration, with the same tensors as weights; None if that cannot be."""
    try:
        # Buffers that are in no checkpoint are computed when the model is built, therefore not on the meta device.
        with empty_weights():
            twin: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
        for name, weight in model.named_parameters(remove_duplicate=False):
            path, _, own = name.rpartition(".")
            setattr(twin.get_submodule(path), own, weight)
        kept = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers(remove_duplicate=False):
            path, _, own = name.rpartition(".")
            if name in kept:
                twin.get_submodule(path)._buffers[own] = buffer
    except Exception as error:
        log.debug("%s cannot be built from its configuration: %s", type(model).__name__, error)
        return None
    if any(weight.is_meta for weight in twin.parameters()):
        return None
    for module in twin.modules():
        for own, value in module._buffers.items():
            module._buffers[own] = None if value is None else value.to(model.device)
    if model._can_set_experts_implementation() and hasattr(model, "get_experts_implementation"):
        twin.set_experts_implementation(model.get_experts_implementation())
    return twin.eval()


def _own(model: PreTrainedModel, twin: PreTrainedModel | None) -> list[str]:
    """The modules that are not as transformers builds them: by class, forward or hooks."""
    built = {} if twin is None else dict(twin.named_modules())
    found = [f"{len(hooks)} hooks of all modules" for hooks in _global_hooks().values() if hooks]
    for name, module in model.named_modules():
        other, said = built.get(name), name or type(model).__name__
        if other is not None and type(module) is not type(other):
            found.append(f"{said} is a {type(module).__name__} in place of a {type(other).__name__}")
        if "forward" in vars(module) and (other is None or "forward" not in vars(other)):
            found.append(f"{said} has a forward that was replaced")
        for kind, what in (("_forward_hooks", "a forward hook"), ("_forward_pre_hooks", "a forward pre-hook")):
            if len(getattr(module, kind)) > (0 if other is None else len(getattr(other, kind))):
                found.append(f"{said} has {what}")
    return found


def _of_classes(model: PreTrainedModel) -> list[str]:
    """The classes of the libraries whose forward was replaced by one from another file."""
    found = []
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        owner = next((base for base in kind.__mro__ if "forward" in vars(base)), None)
        home = None if owner is None else getattr(sys.modules.get(owner.__module__), "__file__", None)
        if owner is None or home is None or owner.__module__.partition(".")[0] not in LIBRARIES:
            continue
        code = getattr(inspect.unwrap(vars(owner)["forward"]), "__code__", None)
        if code is not None and code.co_filename != home and not _of_a_library(code.co_filename):
            found.append(f"{owner.__name__}.forward was replaced by one from {code.co_filename}")
    return found


def _of_a_library(file: str) -> bool:
    homes = (getattr(sys.modules.get(name), "__path__", None) for name in (*LIBRARIES, "accelerate"))
    return any(file.startswith(path) for home in homes if home for path in home)


def _of_buffers(model: PreTrainedModel, twin: PreTrainedModel | None) -> list[str]:
    """The buffers with other values than are computed when the model is built."""
    others = {} if twin is None else dict(twin.named_buffers(remove_duplicate=False))
    found = []
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in others or (buffer.shape == others[name].shape and torch.equal(buffer, others[name])):
            continue
        if buffer.shape == others[name].shape and torch.equal(buffer, others[name].to(buffer.dtype)):
            # Positions are computed from some; model.to(torch.bfloat16) changes them, and loading in 16 bits does not.
            kind = str(buffer.dtype).removeprefix("torch.")
            found.append(f"{name} was cast to {kind} (from_pretrained with dtype={kind} leaves it as it is)")
        else:
            found.append(f"{name} holds other values")
    return found


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer computes something else than its class in PyTorch or transformers does."""
    if "forward" in vars(layer):
        return not hasattr(layer, "_hf_hook")  # accelerate's only moves tensors between devices
    return type(layer).__module__.partition(".")[0] not in LIBRARIES and type(layer).forward is not nn.Linear.forward
