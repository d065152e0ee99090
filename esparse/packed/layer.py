"""A linear layer with packed weights: GPU kernels, or compiled CPU loops for a few tokens, compute its product.

In all other cases a few rows at a time are made dense and multiplied.

Shapes: T tokens, O outputs, I inputs, K kept weights of a row, S outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from esparse.kernels import linear as kernels
from esparse.kernels import loops as compiled_loops
from esparse.kernels.linear import few_tokens_of, packed_linear
from esparse.packed import matrix
from esparse.packed.matrix import PackedMatrix
from esparse.patterns import Pattern

TILE_BYTES = 2**22  # of the rows that are dense at one time: they should stay in a core's cache
LOOP_TOKENS = {2: 64, 4: 16}  # by bytes of a value: up to this many tokens compiled loops are faster than dense rows


class PackedLinear(nn.Module):
    """A Linear (or Conv1D) that holds its weight packed, and never makes all of it dense at once.

    It is built with empty tensors of the form on disk (on the meta device, for instance); once they are loaded,
    `settle` turns them into the form in memory.
    """

    values: Tensor
    bits: Tensor
    salient_values: Tensor | None
    salient_places: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        pattern: Pattern,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        ordered: bool = False,
    ) -> None:
        """`ordered`: the columns on disk are in the order `order`, and `settle` puts them back into their own order."""
        super().__init__()
        self.in_features, self.out_features, self.pattern = inputs, outputs, pattern
        # Kernels find a kept weight by its group, so they need the columns in group order.
        self.for_kernels = len(pattern.parts()) == 1 and not ordered
        for name, shape in self.file_shapes().items():
            if not name.endswith("values"):
                self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=device))
            else:
                self._keep_values(name, torch.empty(shape, dtype=dtype, device=device))
        if ordered:
            self.register_buffer("order", torch.empty(inputs, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None
        self.sparse_cores = False
        self._blob: Tensor | None = None

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weight's tensors on disk."""
        return matrix.file_shapes(self.pattern, self.out_features, self.in_features)

    def settle(self) -> None:
        """Replaces the form on disk by the form in memory; raises ValueError for a damaged index."""
        tensors = {name: value.cpu() for name, value in self.state_dict().items() if name != "bias"}
        device = next(self.buffers()).device
        packed = matrix.from_file(tensors, self.pattern, self.in_features)
        order_I = self._buffers.pop("order", None)
        packed = packed if order_I is None else packed.restored(order_I.cpu().long())
        for name in [name for name in self._buffers if name.endswith("index")]:
            del self._buffers[name]
        self._keep_values("values", packed.values_OK.to(device))
        self.register_buffer("bits", packed.bits_OB.to(device))
        if packed.outlier_values_OS is not None and packed.outlier_places_OS is not None:
            self._keep_values("salient_values", packed.outlier_values_OS.to(device))
            self.register_buffer("salient_places", packed.outlier_places_OS.to(device))

    def _keep_values(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The kept values (O x K), for code that asks a layer's weight for its device or precision."""
        return self.values

    def packed(self) -> PackedMatrix:
        """The packed weight; it shares memory with the layer."""
        salient_values = getattr(self, "salient_values", None)
        salient_places = getattr(self, "salient_places", None)
        return PackedMatrix(
            self.pattern,
            self.in_features,
            self.values.data,
            self.bits,
            None if salient_values is None else salient_values.data,
            salient_places,
        )

    def forward(self, input: Tensor) -> Tensor:  # a Linear's name, for models that call it by keyword
        x_TI, device = input.reshape(-1, self.in_features), input.device.type
        if torch.is_autocast_enabled(device):
            # Autocast sees no products of kernels: which dtype comes out would depend on the number of tokens. So the
            # product has the precision of the weights, and a Linear's dtype.
            with torch.autocast(device, enabled=False):
                y_TO = _product(x_TI.to(self.weight.dtype), self.bias, self)
            y_TO = y_TO.to(torch.get_autocast_dtype(device))
        else:
            y_TO = _product(x_TI, self.bias, self)
        # As a Linear returns it: contiguous, as a view as complex numbers needs it, and changeable in place.
        return torch.ops.aten._unsafe_view(y_TO.contiguous(), (*input.shape[:-1], self.out_features))

    def product(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x @ W^T + bias (T x O), computed the fastest way for this number of tokens and device; without gradients."""
        if x_TI.is_cuda and self.for_kernels:
            return self.by_kernels(x_TI, bias_O)
        return multiply(self.packed(), x_TI, bias_O)

    def rows_with_zeros(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight, dense; of values that are not rounded the precision is their own."""
        return with_zeros(self.packed(), rows)

    def by_kernels(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product, computed by the kernel for this number of tokens (esparse/kernels/linear.py)."""
        (nm,) = self.pattern.parts()
        few = few_tokens_of(self.values, self.bits, x_TI, n=nm.n, m=nm.m)
        blob = self.second_copy() if len(x_TI) > few else None  # may move the values
        return packed_linear(self.values, self.bits, x_TI, n=nm.n, m=nm.m, bias_R=bias_O, blob=blob)

    def second_copy(self) -> Tensor | None:
        """The weights in cuSPARSELt's format, built at the first call; None if this layer is to have none.

        If that format begins with the values, they are stored only once.
        """
        if self.sparse_cores and self._blob is None:
            self._blob = kernels.compress(self.packed().dense())
            shared_OK = kernels.shared_values(self.values.data, self._blob)
            if shared_OK is not None:
                self.values.data = shared_OK
        return self._blob

    def use_sparse_cores(self, on: bool) -> None:
        """Sets whether sparse tensor cores compute many tokens, from a second copy of the weights."""
        self.sparse_cores = on
        if not on:
            self._drop_second_copy()

    def second_copy_bytes(self) -> int:
        """Bytes that the second copy takes beyond values and bits; 0 while there is none."""
        if self._blob is None:
            return 0
        alone = self.values.nbytes + self.bits.nbytes
        return kernels.resident_bytes(self.values.data, self.bits, self._blob) - alone

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._drop_second_copy()  # it fits one device and dtype only, and is built again
        super()._apply(fn, recurse)
        return self

    def _drop_second_copy(self) -> None:
        if self._blob is not None:
            self._blob, self.values.data = None, self.values.data.clone()  # they may lie in the copy

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.pattern}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """The product with a gradient from packed weights: autograd would keep the whole dense weight for it."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, bias_O: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x_TI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer: PackedLinear = ctx.layer
        grad_TI = grad_O = None
        if ctx.needs_input_grad[0]:
            grad_TI = grad_TO.new_zeros(len(grad_TO), layer.in_features)
            for rows in tiles(layer.out_features, layer.in_features, grad_TO.element_size()):
                grad_TI += grad_TO[:, rows] @ layer.rows_with_zeros(rows, grad_TO.dtype)
        if ctx.needs_input_grad[1]:
            grad_O = grad_TO.sum(0)
        return grad_TI, grad_O, None


@torch.compiler.disable(reason="the product's loops and kernels are compiled by numba and Triton already")
def _product(x_TI: Tensor, bias_O: Tensor | None, layer: PackedLinear) -> Tensor:
    y_TO: Tensor = _Product.apply(x_TI, bias_O, layer)
    return y_TO


def multiply(packed: PackedMatrix, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x @ W^T + bias (T x O) without kernels of a GPU: by compiled loops for a few tokens, else some rows at a time."""
    outputs, kind = len(packed.values_OK), packed.values_OK.dtype
    few = len(x_TI) <= LOOP_TOKENS.get(kind.itemsize, 0) and x_TI.dtype == kind
    compiled = loops(kind) if few and x_TI.device.type == "cpu" else None
    if compiled is not None:
        y_TO: Tensor = compiled.product(packed.values_OK, packed.bits_OB, x_TI, outliers(packed))
        return (y_TO if bias_O is None else y_TO + bias_O).to(x_TI.dtype)
    y_TO = x_TI.new_empty(len(x_TI), outputs)
    for rows in tiles(outputs, packed.inputs, x_TI.element_size()):
        y_TO[:, rows] = linear(x_TI, with_zeros(packed, rows), None if bias_O is None else bias_O[rows])
    return y_TO


def tiles(outputs: int, inputs: int, element_bytes: int) -> Iterator[slice]:
    """The rows of a matrix, some at a time."""
    rows = max(1, TILE_BYTES // (inputs * element_bytes))
    for first in range(0, outputs, rows):
        yield slice(first, min(first + rows, outputs))


@cache
def loops(dtype: torch.dtype) -> Any:
    """The module of compiled loops (esparse/kernels/compiled.py); None without numba or for an unsupported dtype."""
    compiled = compiled_loops("compiled")
    return compiled if compiled is not None and compiled.takes(dtype) else None


def without_loops(dtype: torch.dtype) -> str | None:
    """Why there are no compiled loops for this dtype, and what to do; None: there are."""
    if loops(dtype) is not None:
        return None
    if loops(torch.float32) is None:
        return "install numba for compiled loops (pip install numba)"
    name = str(dtype).removeprefix("torch.")
    return f"the compiled loops are for float32 and bfloat16, on most CPUs for float16, and not for {name}"


def with_zeros(packed: PackedMatrix, rows: slice) -> Tensor:
    """Some rows of a matrix made dense, by compiled loops if numba is installed."""
    compiled = loops(packed.values_OK.dtype) if packed.values_OK.device.type == "cpu" else None
    if compiled is None:
        return packed.dense(rows.start, rows.stop)
    weight_OI: Tensor = compiled.dense(packed.values_OK, packed.bits_OB, outliers(packed), packed.inputs, rows)
    return weight_OI


def outliers(packed: PackedMatrix) -> tuple[Tensor, Tensor, Tensor] | None:
    """The outliers' values, places and run starts for the compiled loops; None if the pattern has none."""
    if packed.outlier_values_OS is None or packed.outlier_places_OS is None:
        return None
    starts_S = matrix.starts(packed.pattern.parts()[1], packed.inputs)
    return packed.outlier_values_OS, packed.outlier_places_OS, starts_S
