"""A linear layer of vLLM that computes from packed weights.

What the files hold of it is collected part by part (q, k and v of one layer, or gate and up), and turned into the form
that is computed from once all is there: rows are put together, and of several ranks each takes its own.

Shapes: T tokens, O outputs, I inputs, K survivors of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from esparse.errors import Mistake
from esparse.kernels.form import packed_bits, unpacked_bits
from esparse.packed import matrix
from esparse.packed.layer import loops
from esparse.packed.matrix import PackedMatrix
from esparse.patterns import Pattern
from esparse.patterns.order import check_order
from esparse.vllm.operator import packed_product

PLACES = {"q": 0, "k": 1, "v": 2, None: 0}  # of a part among the rows of a layer


class Collected(nn.Parameter):
    """A tensor of the files, as it lies there, for each part of the layer; empty itself."""

    parts: dict[int, Tensor]

    def __new__(cls, dtype: torch.dtype) -> Collected:
        self: Collected = super().__new__(cls, torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)
        self.parts = {}
        return self

    def weight_loader(self, param: Any, loaded: Tensor, part: Any = None, *_: Any, **__: Any) -> None:
        place = PLACES.get(part, part)
        if not isinstance(place, int):
            raise Mistake(f"vLLM loads the parts {part} of a layer at once, and the packed ones lie apart")
        self.parts[place] = loaded.detach().to("cpu", copy=True)


class Sizes(NamedTuple):
    """What this rank has of a layer: its inputs, the outputs of each part; and all inputs of the layer."""

    inputs_here: int
    outputs_here: list[int]
    inputs: int
    dtype: torch.dtype


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):
    """`names`: the layers of the checkpoint; `orders`: order, input_order or none; `biased`: those with a bias."""

    def __init__(self, pattern: Pattern, *, names: Sequence[str], orders: set[str], biased: Sequence[str]) -> None:
        self.pattern, self.names, self.orders, self.biased = pattern, list(names), orders, list(biased)
        self._of_layer: dict[nn.Module, Sizes] = {}

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        self._of_layer[layer] = Sizes(input_size_per_partition, list(output_partition_sizes), input_size, params_dtype)
        for name in matrix.file_shapes(self.pattern, 8, input_size):
            layer.register_parameter(name, Collected(torch.uint8 if name.endswith("index") else params_dtype))
        for name in self.orders:
            layer.register_parameter(name, Collected(torch.int32))

    @torch.no_grad()
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if getattr(layer, "bias", None) is None and self.biased:
            raise Mistake(f"vLLM's layer has no place for the bias of {self.biased[0]}: the recovery added it")
        inputs_here, outputs_here, inputs, dtype = self._of_layer.pop(layer)
        ranks, rank = getattr(layer, "tp_size", 1), getattr(layer, "tp_rank", 0)
        tensors = {name: value.parts for name, value in layer.named_parameters() if isinstance(value, Collected)}
        order_I = self._order(tensors, inputs)
        parts = sorted(tensors["values"])
        if len(parts) != len(self.names):
            raise Mistake(f"the files hold {len(parts)} of the {len(self.names)} layers {', '.join(self.names)}")
        pieces = []
        for place in parts:
            one = {name: of[place] for name, of in tensors.items() if place in of and name not in self.orders}
            packed = self._read(one, self.names[place], inputs, dtype)
            pieces.append(_rows(packed, outputs_here, place, len(parts), ranks, rank, self.names[place]))
        whole = _together(pieces)
        if inputs_here < inputs:
            whole, order_I = _columns(whole, order_I, inputs_here, rank, self.names[0])
        device = next((b.device for b in [getattr(layer, "bias", None)] if b is not None), _device())
        for name in tensors:
            delattr(layer, name)
        stored = {
            "values": whole.values_OK,
            "bits": whole.bits_OB,
            "outlier_values": whole.outlier_values_OS,
            "outlier_places": whole.outlier_places_OS,
            "order": order_I,
        }
        if device.type == "cpu" and (compiled := loops(dtype)) is not None:  # now, and not while a request waits
            compiled.product(whole.values_OK[:1], whole.bits_OB[:1], torch.zeros(1, whole.inputs, dtype=dtype))
        for name, value in stored.items():
            kept = None if value is None else nn.Parameter(value.to(device), requires_grad=False)
            layer.register_parameter(name, kept)

    def _order(self, tensors: dict[str, dict[int, Tensor]], inputs: int) -> Tensor | None:
        found = [order_I for name in sorted(self.orders) for order_I in tensors[name].values()]
        if self.orders and not found:
            raise Mistake(f"the files hold no order of the columns of {self.names[0]}")
        for order_I in found:
            try:
                check_order(order_I, inputs)
            except ValueError as error:
                raise Mistake(f"the order of the columns of {self.names[0]} cannot be read: {error}") from error
            if not torch.equal(order_I, found[0]):
                raise Mistake(f"vLLM computes {', '.join(self.names)} as one layer, and they read in several orders")
        return found[0] if found else None

    def _read(self, tensors: dict[str, Tensor], name: str, inputs: int, dtype: torch.dtype) -> PackedMatrix:
        shapes = matrix.file_shapes(self.pattern, len(tensors["values"]), inputs)
        for ending, shape in shapes.items():
            if ending not in tensors or tuple(tensors[ending].shape) != shape:
                raise Mistake(f"{name}.{ending} does not have the shape {list(shape)}: the file is damaged")
        try:
            packed = matrix.from_file(tensors, self.pattern, inputs)
        except ValueError as error:
            raise Mistake(f"the packed layer {name} cannot be read: {error}") from error
        outliers = packed.outlier_values_OS
        return replace(
            packed,
            values_OK=packed.values_OK.to(dtype),
            outlier_values_OS=None if outliers is None else outliers.to(dtype),
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = packed_product(
            x,
            layer.values,
            layer.bits,
            layer.outlier_values,
            layer.outlier_places,
            layer.order,
            bias,
            str(self.pattern),
        )
        return y


def _device() -> torch.device:
    from vllm.platforms import current_platform

    return torch.device(current_platform.device_type)


def _rows(
    packed: PackedMatrix, sizes: list[int], place: int, parts: int, ranks: int, rank: int, name: str
) -> PackedMatrix:
    """The rows of one part that this rank computes; key and value heads may be the same on several ranks."""
    here = sizes[place] if parts == len(sizes) else sum(sizes)
    cuts = len(packed.values_OK) // here
    if here * cuts != len(packed.values_OK) or cuts > ranks or (cuts > 1 and parts != len(sizes)):
        raise Mistake(f"the rows of {name} cannot be shared among {ranks} ranks: use tensor_parallel_size=1")
    first = rank * cuts // ranks * here
    rows = slice(first, first + here)

    def cut(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows]

    return replace(
        packed,
        values_OK=packed.values_OK[rows],
        bits_OB=packed.bits_OB[rows],
        outlier_values_OS=cut(packed.outlier_values_OS),
        outlier_places_OS=cut(packed.outlier_places_OS),
    )


def _together(pieces: list[PackedMatrix]) -> PackedMatrix:
    def joined(of_each: list[Tensor | None]) -> Tensor | None:
        present = [value for value in of_each if value is not None]
        return torch.cat(present) if present else None

    return replace(
        pieces[0],
        values_OK=torch.cat([piece.values_OK for piece in pieces]),
        bits_OB=torch.cat([piece.bits_OB for piece in pieces]),
        outlier_values_OS=joined([piece.outlier_values_OS for piece in pieces]),
        outlier_places_OS=joined([piece.outlier_places_OS for piece in pieces]),
    )


def _columns(
    packed: PackedMatrix, order_I: Tensor | None, inputs_here: int, rank: int, name: str
) -> tuple[PackedMatrix, Tensor | None]:
    """The columns that this rank computes, of a layer whose inputs are shared among the ranks."""
    base, *outliers = packed.pattern.parts()
    if inputs_here % base.m or outliers:
        why = "outliers are bound to their runs" if outliers else f"{base.m} does not divide {inputs_here}"
        raise Mistake(f"the columns of {name} cannot be shared among ranks ({why}): use tensor_parallel_size=1")
    first = rank * inputs_here
    columns = slice(first, first + inputs_here)
    if order_I is not None:
        order_I = order_I[columns] - first
        if not bool(((order_I >= 0) & (order_I < inputs_here)).all()):
            raise Mistake(
                f"the shuffle of {name} reaches across ranks: use tensor_parallel_size=1, or prune with "
                "shuffle.foldable=true or shuffle=none"
            )
    kept = base.n * (inputs_here // base.m)
    values_OK = packed.values_OK[:, rank * kept : (rank + 1) * kept].contiguous()
    bits_OB = packed_bits(unpacked_bits(packed.bits_OB, packed.inputs)[:, columns])
    return replace(packed, inputs=inputs_here, values_OK=values_OK, bits_OB=bits_OB), order_I
