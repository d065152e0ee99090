"""Refuses models in memory that cannot be pruned, and restores the state of the others."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esparse.api.pruning_report import Report
from esparse.errors import Mistake
from esparse.models.as_built import difference
from esparse.models.damage import not_finite
from esparse.packed.experts import PackedExperts
from esparse.packed.layer import PackedLinear

log = logging.getLogger("esparse")
P = ParamSpec("P")
T = TypeVar("T")

FEW = 32  # tokens on which a model is tried
UNDERFLOW = 0.01  # share of kept weights that may have become zero since
_busy: set[int] = set()  # the models that calls work on, by their ids
_of_busy = threading.Lock()


def check_kind(model: Any) -> None:
    """Raises Mistake if `model` is no causal language model of transformers."""
    if not isinstance(model, PreTrainedModel):
        hints = {
            "PeftModel": ": merge its adapter first, model = model.merge_and_unload()",
            "OptimizedModule": ": give the model that was compiled, model._orig_mod",
            "DataParallel": ": give the model inside, model.module",
            "DistributedDataParallel": ": give the model inside, model.module",
            "FullyShardedDataParallel": ": esparse brings one block at a time to the device by itself",
        }
        hint = next((hints[base.__name__] for base in type(model).__mro__ if base.__name__ in hints), "")
        raise Mistake(f"a causal language model of transformers was expected, got a {type(model).__name__}{hint}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise Mistake(f"{type(model).__name__} is an encoder with a decoder: esparse prunes decoder-only models")


def check_batch(batch_tokens: Any) -> None:
    if batch_tokens is None:
        return
    if not isinstance(batch_tokens, int) or isinstance(batch_tokens, bool) or batch_tokens < 1:
        raise Mistake(f"batch_tokens must be a positive integer, got {batch_tokens!r}")


def check_model(model: Any) -> None:
    """Raises Mistake if the model cannot be pruned correctly in its present state in memory."""
    check_kind(model)
    if _is_packed(model) and getattr(model.config, "quantization_config", None) is None:
        raise Mistake("the model is packed already: prune and save it before")
    if getattr(model, "hf_quantizer", None) is not None:
        what = "packed by esparse" if _is_packed(model) else "quantised"
        raise Mistake(f"the model is {what}: load it in full precision, and prune or save that")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise Mistake("the model has an adapter: merge it into the weights first")
    devices = {parameter.device for parameter in model.parameters()}
    spread = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if any(device.type == "meta" for device in devices) or "disk" in spread:
        raise Mistake(
            "weights of the model are not in memory: load it without device_map; a model larger than the memory "
            "is pruned by the command line, with model.store=shards"
        )
    if len(spread) > 1 or len(devices) > 1:
        places = ", ".join(sorted(spread if len(spread) > 1 else map(str, devices)))
        raise Mistake(
            f"the model is spread over several devices ({places}): load it without device_map, on the CPU if need be, "
            "and name the device that computes (device=...); esparse brings it there block by block"
        )
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise Mistake("the model is shared between processes (tensor parallel): load it without tp_plan")
        if parameter.is_inference():
            raise Mistake(f"{name} was made under torch.inference_mode(): load the model outside of it")
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise Mistake(
                f"{name} is in {str(parameter.dtype).removeprefix('torch.')}: load the model in full precision"
            )
        if any(step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True)):
            raise Mistake(f"{name} has one number in memory for several weights (expand): give it a clone() of them")
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise Mistake(f"{name} has an adapter ({type(module).__name__}): merge it into the weights first")
        if hasattr(module, "parametrizations"):
            raise Mistake(f"{name} computes its weight from others (torch.nn.utils.parametrize): remove that first")
        if {"weight_orig", "weight_g"} & module._parameters.keys():
            raise Mistake(
                f"{name} computes its weight from others (torch.nn.utils.prune, weight_norm or spectral_norm): remove "
                "that first"
            )
        if type(module).__name__ == "OptimizedModule":
            raise Mistake(f"{name} was compiled: put the module itself back in its place, {name}._orig_mod")


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear | PackedExperts) for module in model.modules())


def check_same(model: nn.Module, report: Report) -> None:
    """Raises Mistake if the report belongs to another model, or to another pruning of it.

    Zeros among the kept weights are allowed up to a share of `UNDERFLOW`: a cast to 16 bits makes some.
    """
    if not isinstance(report, Report):
        raise Mistake(f"report must be what esparse.prune returned for this model, got {report!r:.60}")
    parameters = dict(model.named_parameters(remove_duplicate=False))  # blocks may share some
    nonzeros = 0
    for matrix, _ in report.pruned.groupings:
        parameter = parameters.get(matrix.entry)
        if parameter is None or parameter.shape != matrix.parameter.shape:
            raise Mistake(f"the report is of another model: this one has no {matrix.entry} of its shape")
        keep_OI = report.pruned.keeps.of(matrix.entry, matrix.expert)
        nonzero_OI = matrix.part_of(parameter.data).ne(0).cpu()
        nonzeros += int(nonzero_OI.sum())
        if bool((nonzero_OI & ~keep_OI).any()):
            raise Mistake(
                f"{matrix.name} has weights that were pruned according to the report: the model was changed or pruned "
                "again since, and a later report may fit"
            )
    if nonzeros < (1 - UNDERFLOW) * report.pruned.kept:
        raise Mistake(
            f"the report counts {report.pruned.kept:,} nonzeros, and the model has {nonzeros:,} in these layers: the "
            "model was changed or pruned again since, and a later report may fit"
        )


def check_runs(model: PreTrainedModel, tokens_SL: Tensor) -> None:
    """Raises Mistake if the model does not give finite logits of every token; tried on a few."""
    tokens_BL = tokens_SL[:1, :FEW].to(model.get_input_embeddings().weight.device)
    kind = type(model).__name__
    try:
        with torch.no_grad():
            out = model(input_ids=tokens_BL, use_cache=False)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise Mistake(f"the {kind} does not run on tokens by itself ({type(error).__name__}: {reason})") from error
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens_BL.shape:
        got = "no logits" if not isinstance(logits, Tensor) else f"logits of shape {list(logits.shape)}"
        raise Mistake(
            f"a causal language model of transformers was expected (AutoModelForCausalLM), and a {kind} gives {got} "
            f"for tokens of shape {list(tokens_BL.shape)}"
        )
    if bool(logits.isnan().any()):
        raise not_finite("the model's logits hold NaN", model.named_parameters())


def warn_if_changed(model: PreTrainedModel, tokens_SL: Tensor) -> None:
    """Logs a warning if the model computes what no checkpoint of it would have, such as hooks."""
    if (found := difference(model, tokens_SL)) is not None:
        log.warning(
            "the model is not what transformers builds from its configuration: %s; it is pruned as it is, and a "
            "checkpoint of it will not have that",
            found,
        )


def check_as_built(model: PreTrainedModel, tokens_SL: Tensor) -> None:
    """Raises Mistake if the model that is loaded from a checkpoint would be clearly another one, else as above."""
    found = difference(model, tokens_SL)
    if found is None:
        return
    if found.is_large:
        raise Mistake(
            f"a checkpoint would be another model than this one: {found}; undo that, or change the model's "
            "configuration with it, prune again and save"
        )
    log.warning("a checkpoint of the model is without this: %s", found)


def as_usual(function: Callable[P, T]) -> Callable[P, T]:
    """The function in a caller's inference mode, or with a default device of theirs, as it is without."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        elsewhere = torch.get_default_device().type != "cpu"  # where tokens and random numbers would be made
        with torch.inference_mode(False), torch.device("cpu") if elsewhere else nullcontext():
            return function(*args, **kwargs)

    return called


@contextmanager
def as_found(model: PreTrainedModel, *, experts: bool = True) -> Iterator[None]:
    """While open, the model is in evaluation mode, has no gradients, is not compiled, and computes expert by expert.

    Restores its state on exit. A caller's autocast is off meanwhile: results must not depend on it.
    """
    with alone(model):
        yield from _as_found(model, experts)


@contextmanager
def alone(model: PreTrainedModel) -> Iterator[None]:
    """While open, no other call works on the model; raises Mistake if one does: both would write to its blocks."""
    with _of_busy:
        if id(model) in _busy:
            raise Mistake("another call of esparse works on this model: wait for it, or give each thread its own model")
        _busy.add(id(model))
    try:
        yield
    finally:
        with _of_busy:
            _busy.discard(id(model))


def _as_found(model: PreTrainedModel, experts: bool) -> Iterator[None]:
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in wanted if parameter.grad is not None}
    switched = experts and _experts(model) is not None
    before = _experts(model)
    try:
        model.eval()
        for module in compiled:
            module._compiled_call_impl = None
        for parameter in gradients:
            parameter.grad = None
        if switched:
            model.set_experts_implementation("eager")
        with torch.inference_mode(False), ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if switched:
            model.set_experts_implementation(before)
        for module, training in modes.items():
            module.training = training
        for module, call in compiled.items():
            module._compiled_call_impl = call
        for parameter, required in wanted.items():
            parameter.requires_grad_(required)
            parameter.grad = gradients.get(parameter)


def _experts(model: PreTrainedModel) -> Any:
    """The experts implementation of each part of the model; None if it cannot be switched."""
    if not model._can_set_experts_implementation() or not hasattr(model, "get_experts_implementation"):
        return None
    return model.get_experts_implementation()
