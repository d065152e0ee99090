"""Packs a pruned model in memory: packed layers replace the dense ones.

Every matrix goes through the form on disk (packed/matrix.py), so that there is only one path to test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esparse.errors import Mistake
from esparse.export.packed_checkpoint import stacks_of, tensors_of, why_dense
from esparse.models.as_built import has_own_forward
from esparse.models.matrices import Matrix
from esparse.models.reorder import gather_before
from esparse.packed.experts import PackedExperts
from esparse.packed.layer import PackedLinear
from esparse.packed.quantised_layer import QuantisedLinear
from esparse.packed.quantizer import EsparseConfig, EsparseQuantizer
from esparse.patterns import Grouping
from esparse.pruning.outcome import Pruned


@torch.no_grad()
def pack_layers(model: nn.Module, pruned: Pruned) -> dict[str, str]:
    """Replaces the model's layers by packed ones; returns the weights that stay dense, each with the reason.

    Raises ValueError for a pattern without n:m groups, and for a weight that is not the model's or does not hold its
    pattern; layers that were packed before it stay packed.
    """
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    left = {}
    for matrix, grouping in pruned.groupings:
        parameter = _parameter(model, matrix)
        if len(names[id(parameter)]) > 1:
            left[matrix.entry] = f"it is one weight with {', '.join(sorted(names[id(parameter)] - {matrix.entry}))}"
        elif matrix.expert is None and has_own_forward(model.get_submodule(matrix.entry.removesuffix(".weight"))):
            left[matrix.entry] = "its layer has a forward of its own, which a packed layer would not have"
        elif matrix.expert is None:
            _pack_layer(model, matrix, grouping, pruned)
    for entry, experts in stacks_of(pruned).items():
        if entry in left:
            continue
        if (why := why_dense(experts)) is not None:
            left[entry] = why
        else:
            _pack_experts(model, entry, experts, pruned)
    return left


def _parameter(model: nn.Module, matrix: Matrix) -> nn.Parameter:
    try:
        return model.get_parameter(matrix.entry)
    except AttributeError:
        raise Mistake(f"the model has no weight {matrix.entry}: it is packed already, or another model") from None


def _pack_layer(model: nn.Module, matrix: Matrix, grouping: Grouping, pruned: Pruned) -> None:
    name = matrix.entry.removesuffix(".weight")
    old = model.get_submodule(name)
    parameter = model.get_parameter(matrix.entry)
    weight_OI = matrix.part_of(parameter.data).cpu()
    order_I = None if grouping.order_I is None else grouping.order_I.cpu()
    gathered = order_I is not None and len(grouping.pattern.parts()) > 1  # outliers cannot be reordered
    tensors = _tensors(matrix, Grouping(grouping.pattern, order_I), weight_OI, pruned)
    if order_I is not None and not gathered:
        tensors["order"] = order_I.int()
    outputs, inputs = weight_OI.shape
    shape = (inputs, outputs, grouping.pattern)
    how: dict[str, Any] = {"dtype": parameter.dtype, "device": torch.device("cpu"), "ordered": "order" in tensors}
    if pruned.grid is None:
        layer = PackedLinear(*shape, bias=False, **how)
    else:
        layer = QuantisedLinear(*shape, pruned.grid, bias=False, **how)
    _fill(layer, tensors)
    layer.settle()
    layer.to(parameter.device)
    _refuse_saving(model)
    layer.bias = old.bias  # type: ignore[assignment]
    if gathered:
        assert order_I is not None
        gather_before(layer, order_I.int().to(parameter.device))
    _succeed(layer, old)
    model.set_submodule(name, layer)


def _pack_experts(model: nn.Module, entry: str, experts: Sequence[tuple[Matrix, Grouping]], pruned: Pruned) -> None:
    path, _, own = entry.rpartition(".")
    owner, parameter = model.get_submodule(path), model.get_parameter(entry)
    first, ordered = experts[0][0], experts[0][1].order_I is not None
    of_each = []
    for matrix, grouping in experts:
        order_I = None if grouping.order_I is None else grouping.order_I.cpu()
        one = _tensors(matrix, Grouping(grouping.pattern, order_I), matrix.part_of(parameter.data).cpu(), pruned)
        of_each.append(one | ({} if order_I is None else {"order": order_I.int()}))
    layer = PackedExperts(
        (parameter.shape[0], parameter.shape[1], parameter.shape[2]),
        experts[0][1].pattern,
        transposed=first.transposed,
        ordered=ordered,
        dtype=parameter.dtype,
        device=torch.device("cpu"),
        grid=pruned.grid,
    )
    _fill(layer, {name: torch.stack([one[name] for one in of_each]) for name in of_each[0]})
    layer.settle()
    _refuse_saving(model)
    del owner._parameters[own]
    owner.register_module(own, layer.to(parameter.device).train(owner.training))


def _tensors(matrix: Matrix, grouping: Grouping, weight_OI: Tensor, pruned: Pruned) -> dict[str, Tensor]:
    try:
        return tensors_of(grouping.ordered(weight_OI).contiguous(), grouping.pattern, pruned, matrix)
    except ValueError as error:
        raise Mistake(f"{matrix.name} cannot be packed: {error}; was it changed since it was pruned?") from error


def _fill(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    stored = dict(layer.named_parameters()) | dict(layer.named_buffers())
    for name, value in tensors.items():
        stored[name].data.copy_(value)


def _refuse_saving(model: nn.Module) -> None:
    """Gives the model what a loaded one has, so that `save_pretrained` does not write weights that nobody can load."""
    model.hf_quantizer = EsparseQuantizer(EsparseConfig(layers={}, files={}))


def _succeed(layer: nn.Module, old: nn.Module) -> None:
    """Gives the new layer the mode and the hooks of the layer that it replaces."""
    layer.train(old.training)
    for kind, own in vars(old).items():
        if kind.startswith("_forward") and "hook" in kind:
            getattr(layer, kind).update(own)
