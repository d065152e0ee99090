"""Makes channel orders physical: stores the columns of a matrix in the order in which its groups are cut.

The matrix's input must then come in that order, too. If rows of an earlier matrix make it, these rows are put into the
order (down_proj's order into the rows of gate and up; o_proj's into those of v_proj, as far as it stays within heads),
and running the model costs nothing extra. Otherwise the input is gathered, once for all its readers: behind the norm
that makes it, if nothing else reads that norm, else in front of the layer. models/graph.py finds the producers.

Shapes: T tokens, I channels of a tensor, R rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esparse.models.block import Block
from esparse.models.graph import BlockGraph
from esparse.models.matrices import InputGroup, Matrix
from esparse.models.producers import row_maps, row_sets

Rows = list[tuple[Matrix, Tensor]]  # matrices, each with its row for each channel of a tensor


@dataclass(slots=True)
class Reordered:
    """A plan for storing the weights of one block. `order[k]` is the old index of the row or column at index k."""

    columns: dict[str, Tensor] = field(default_factory=dict)  # by the weight's name in the state dict
    rows: dict[str, Tensor] = field(default_factory=dict)  # of weight and bias, by the weight's name
    behind: dict[str, Tensor] = field(default_factory=dict)  # gathers behind a norm, by the module's name
    readers: dict[str, list[str]] = field(default_factory=dict)  # the layers that read such a norm
    before: dict[str, Tensor] = field(default_factory=dict)  # gathers in front of a layer, likewise
    absorbed: int = 0  # tensors that earlier rows put into order
    left: list[str] = field(default_factory=list)  # weights whose order is not made physical
    transposed: set[str] = field(default_factory=set)

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the block, by its name in the state dict, in its stored order."""
        columns, outputs = (0, 1) if name in self.transposed else (1, 0)
        if name in self.columns:
            value = value.index_select(columns, self.columns[name].to(value.device))
        if name in self.rows:
            value = value.index_select(outputs, self.rows[name].to(value.device))
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and weight in self.rows:
            value = value.index_select(0, self.rows[weight].to(value.device))
        return value


def reorder(block: Block, orders: Mapping[str, Tensor], *, gathers: bool) -> Reordered:
    """Plans how to make the orders of this block's weights physical; does not change the block, which is on the device.

    Without `gathers` it plans only orders that can be absorbed, and lists the other weights in `left`. Experts are
    always in `left`, because their input is selected inside one module.
    """
    plan, graph = Reordered(), BlockGraph(block)
    graph.watch(lambda group, x_TI: None)
    for group in graph.matrices.groups:
        ordered = [matrix for matrix in group.matrices if matrix.entry in orders]
        if not ordered:
            continue
        order_I = None if ordered[0].expert is not None else orders[ordered[0].entry].long()
        if order_I is not None and torch.equal(order_I, torch.arange(len(order_I))):
            continue
        rows = None if order_I is None else _absorbing(graph, group, order_I)
        if rows is not None and any(matrix.entry in plan.rows for matrix, _ in rows):
            rows = None  # these rows are in another tensor's order already
        norm = graph.norm_before(group) if gathers else None
        if order_I is None or (rows is None and not gathers):
            plan.left += [matrix.entry for matrix in ordered if matrix.entry not in plan.left]
            continue
        if rows is not None:
            plan.rows |= {matrix.entry: order_R for matrix, order_R in rows}
            plan.absorbed += 1
        elif norm is not None and _gathered_behind(graph, group, norm[1], order_I):
            plan.behind[norm[0]] = order_I
            plan.readers[norm[0]] = [matrix.name for matrix in group.matrices]
        else:
            plan.before |= {matrix.name: order_I for matrix in group.matrices}
        plan.columns |= {matrix.entry: order_I for matrix in group.matrices}
    plan.transposed = {m.entry for group in graph.matrices.groups for m in group.matrices if m.transposed}
    return plan


def gather_behind(norm: nn.Module, order_I: Tensor) -> Any:
    """Makes the norm return its channels in this order; returns the hook, which can be pickled."""
    norm.register_buffer("output_order", order_I)
    return norm.register_forward_hook(_output_gathered)


def gather_before(layer: nn.Module, order_I: Tensor) -> Any:
    """Makes the layer get its channels in this order; returns the hook, which can be pickled."""
    layer.register_buffer("input_order", order_I)
    return layer.register_forward_pre_hook(_input_gathered, with_kwargs=True)


def _output_gathered(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.index_select(-1, module.get_buffer("output_order"))


def _input_gathered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    order_I = module.get_buffer("input_order")
    if args:
        return (args[0].index_select(-1, order_I), *args[1:]), kwargs
    return args, {name: x.index_select(-1, order_I) for name, x in kwargs.items()}  # a layer's one argument


@torch.no_grad()
def apply(model: nn.Module, name: str, plan: Reordered) -> None:
    """Reorders the block of this name in memory; it computes the same as before."""
    block = model.get_submodule(name)
    for own, parameter in block.named_parameters():
        parameter.data = plan.stored(f"{name}.{own}", parameter.data)
    for module, order_I in plan.behind.items():
        gather_behind(model.get_submodule(module), order_I.to(parameter.device))
    for module, order_I in plan.before.items():
        gather_before(model.get_submodule(module), order_I.to(parameter.device))


def absorbs(graph: BlockGraph, group: InputGroup, order_I: Tensor) -> bool:
    """Whether rows of matrices before a group can put its input into this order; the block stays as it is."""
    return _absorbing(graph, group, order_I) is not None


def _absorbing(graph: BlockGraph, group: InputGroup, order_I: Tensor) -> Rows | None:
    """The matrices whose rows make the group's input, each with its new order of rows; None if there are none."""
    before_TI: Tensor | None = None
    for made_by in _candidates(graph, group):
        orders_R = [_row_order(matrix, row_of_I, order_I) for matrix, row_of_I in made_by]
        # Two halves of one matrix are reordered one after the other.
        of_matrix: dict[Matrix, Tensor] = {}
        for (matrix, _), order_R in zip(made_by, orders_R, strict=True):
            if order_R is None:
                break
            of_matrix[matrix] = order_R if matrix not in of_matrix else of_matrix[matrix][order_R]
        else:
            before_TI = graph.tensor(None, group) if before_TI is None else before_TI
            if _follows(graph, group, of_matrix, before_TI, order_I):
                return list(of_matrix.items())
    return None


def _candidates(graph: BlockGraph, group: InputGroup) -> Iterator[Rows]:
    """Possible producers of a group's input, the likeliest first.

    Two layers with one input whose outputs are multiplied (gate and up); both in one matrix, as halves or in turns;
    rows of one matrix.
    """
    if graph.source(group) is not None:
        return  # a norm's weights could be reordered, but not its input, the hidden states
    inputs, all_I = group.inputs, torch.arange(group.inputs)
    groups = graph.matrices.groups
    for before in reversed(groups[: groups.index(group)]):
        fitting = [m for m in before.matrices if m.expert is None and m.view().shape[0] == inputs]
        if len(fitting) > 1:
            yield [(matrix, all_I) for matrix in fitting]
    for matrix in graph.earlier(group):
        outputs = matrix.view().shape[0]
        if outputs == 2 * inputs:
            yield [(matrix, all_I), (matrix, all_I + inputs)]
            yield [(matrix, 2 * all_I), (matrix, 2 * all_I + 1)]
        for rows_V in row_sets(outputs, inputs, heads=True):
            for row_of_I in row_maps(rows_V, inputs):
                yield [(matrix, row_of_I)]


def _row_order(matrix: Matrix, row_of_I: Tensor, order_I: Tensor) -> Tensor | None:
    """The order of a matrix's rows that puts their channels into `order_I`; None if there is no such order.

    Channels that one row makes must stay together.
    """
    order_R = torch.arange(matrix.view().shape[0])
    order_R[row_of_I] = row_of_I[order_I]
    return order_R if torch.equal(order_R[row_of_I], row_of_I[order_I]) else None


@torch.no_grad()
def _follows(
    graph: BlockGraph, group: InputGroup, orders: Mapping[Matrix, Tensor], before_TI: Tensor, order_I: Tensor
) -> bool:
    """Whether reordering these rows puts the tensor into the order, and nothing else reads the tensor."""
    with _restored([*orders, *group.matrices]):
        for matrix, order_R in orders.items():
            _set(matrix.view(), 0, order_R)
            for bias_R in _biases([matrix]):
                _set(bias_R, 0, order_R)
        after_TI = graph.tensor(None, group)
        expected_TI = before_TI[:, order_I.to(before_TI.device)]
        if not graph.follows(after_TI, expected_TI, group.matrices[0].parameter.dtype):
            return False
        for matrix in group.matrices:
            _set(matrix.view(), 1, order_I)
        return graph.same()


@torch.no_grad()
def _gathered_behind(graph: BlockGraph, group: InputGroup, norm: nn.Module, order_I: Tensor) -> bool:
    """Whether the block still returns the same if the norm's output is gathered for all its readers."""
    with _restored(group.matrices):
        for matrix in group.matrices:
            _set(matrix.view(), 1, order_I)
        hook = gather_behind(norm, order_I.to(group.matrices[0].parameter.device))
        try:
            return graph.same()
        finally:
            hook.remove()
            del norm.output_order


@contextmanager
def _restored(matrices: list[Matrix]) -> Iterator[None]:
    """On exit, restores these matrices and their biases."""
    saved = [(value, value.clone()) for value in (*(m.parameter.data for m in matrices), *_biases(matrices))]
    try:
        yield
    finally:
        for value, before in saved:
            value.copy_(before)


def _biases(matrices: list[Matrix]) -> list[Tensor]:
    found = [getattr(matrix.layer, "bias", None) for matrix in matrices]
    return [bias.data for bias in found if isinstance(bias, nn.Parameter)]


def _set(stored: Tensor, dim: int, order: Tensor) -> None:
    stored.copy_(stored.index_select(dim, order.to(stored.device)))
