"""A linear layer with quantised packed weights: its product comes from codes and scales, of which no copy is made.

For a few tokens compiled CPU loops or a GPU's kernels turn codes into numbers where they multiply them; otherwise a few
rows at a time are made dense.

Shapes: T tokens, O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from esparse.kernels import loops as compiled_loops
from esparse.kernels.form import Coded
from esparse.kernels.linear import has_triton
from esparse.packed import grid_sizes, matrix, quantised
from esparse.packed.layer import LOOP_TOKENS, PackedLinear, tiles
from esparse.packed.quantised import QuantisedMatrix
from esparse.patterns import NM, Pattern
from esparse.patterns.order import check_order
from esparse.quantise.grids import Grid


class QuantisedLinear(PackedLinear):
    """A PackedLinear whose values are codes of a grid, on disk and in memory.

    Columns stay in group order, because scales belong to groups: if they are `ordered`, the input is gathered.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        pattern: Pattern,
        grid: Grid,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        ordered: bool = False,
    ) -> None:
        self.grid = grid
        # Of the precision that the layer computes in, which codes do not have; never on "meta", which nothing leaves.
        self._like = torch.empty(0, dtype=dtype, device="cpu")
        super().__init__(inputs, outputs, pattern, bias=bias, dtype=dtype, device=device, ordered=ordered)
        self.for_kernels = False  # those of esparse/kernels/linear.py take values; coded_gemv.py takes codes

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        return grid_sizes.file_shapes(self.pattern, self.out_features, self.in_features, self.grid)

    def settle(self) -> None:
        """Replaces the form on disk by the form in memory; raises ValueError for a damaged index or scale."""
        device = self.weight.device
        if (order_I := self._buffers.get("order")) is not None:
            check_order(order_I, self.in_features)
        names = self.file_shapes()
        tensors = {name: value.cpu() for name, value in self.state_dict().items() if name in names}
        of = quantised.from_file(tensors, self.pattern, self.in_features, self.grid)
        for name in names:
            self._buffers.pop(name, None)
        for name, value in of.tensors().items():
            if name == "salient_values":
                self._keep_values(name, value.to(device))
            else:
                self.register_buffer(name, value.to(device))

    @property
    def weight(self) -> Tensor:
        """An empty tensor, for code that asks a layer's weight for its device or precision."""
        return torch.empty(0, dtype=self._like.dtype, device=self.get_buffer("codes").device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        super()._apply(fn, recurse)
        self._like = fn(self._like)
        return self

    def quantised(self) -> QuantisedMatrix:
        """The weight, with its columns in group order; it shares memory with the layer."""
        return QuantisedMatrix.of(self._tensors(), self.pattern, self.in_features, self.grid)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            name: value.data for name, value in (*self._buffers.items(), *self._parameters.items()) if value is not None
        }

    def forward(self, input: Tensor) -> Tensor:
        order_I = self._buffers.get("order")
        return super().forward(input if order_I is None else input.index_select(-1, order_I))

    def product(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        if x_TI.is_cuda and has_triton() and (y_TO := self.of_few(x_TI, bias_O)) is not None:
            return y_TO
        return multiply(self.quantised(), x_TI, bias_O)

    def of_few(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor | None:
        """The product by Triton kernels (esparse/kernels/coded_gemv.py); None if they do not take it."""
        from esparse.kernels import coded_gemv

        of, base = coded(self.quantised()), next(iter(self.pattern.parts()), NM(1, 1))
        if not coded_gemv.takes(of, len(x_TI), n=base.n, m=base.m):
            return None
        y_TO = coded_gemv.product(of, x_TI, n=base.n, m=base.m)
        return y_TO if bias_O is None else y_TO + bias_O

    def rows_with_zeros(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return with_zeros(self.quantised(), rows, dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight with its columns in their own order, for tests and conversions."""
        weight_OI = self.quantised().dense(dtype=dtype)
        order_I = self._buffers.get("order")
        return weight_OI if order_I is None else torch.empty_like(weight_OI).index_copy_(1, order_I.long(), weight_OI)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.grid.code_bits} bits"


def multiply(of: QuantisedMatrix, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x @ W^T + bias (T x O): by compiled loops for a few tokens on a CPU, else some rows at a time."""
    outputs = len(of.codes_OB)
    few = len(x_TI) <= LOOP_TOKENS.get(x_TI.dtype.itemsize, 0) and x_TI.device.type == "cpu"
    compiled = loops() if few else None
    if compiled is not None:
        y_TO: Tensor = compiled.product(coded(of), x_TI)
        return (y_TO if bias_O is None else y_TO + bias_O).to(x_TI.dtype)
    y_TO = x_TI.new_empty(len(x_TI), outputs)
    for rows in tiles(outputs, of.inputs, x_TI.element_size()):
        y_TO[:, rows] = linear(x_TI, with_zeros(of, rows, x_TI.dtype), None if bias_O is None else bias_O[rows])
    return y_TO


def with_zeros(of: QuantisedMatrix, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of a matrix made dense, by compiled loops if numba is installed."""
    compiled = loops() if of.codes_OB.device.type == "cpu" else None
    if compiled is None:
        return of.dense(rows.start, rows.stop, dtype)
    weight_OI: Tensor = compiled.dense(coded(of), rows)
    return weight_OI.to(dtype)


def loops() -> Any:
    """The module of compiled loops (esparse/kernels/coded.py); None without numba."""
    return compiled_loops("coded")


def coded(of: QuantisedMatrix) -> Coded:
    """The matrix as loops and kernels take it; it shares memory."""
    outliers: dict[str, Tensor | None] = {}
    if of.outlier_places_OS is not None:
        outliers = {
            "outlier_values_OS": of.outlier_values_OS,
            "outlier_codes_OS": of.outlier_codes_OS,
            "outlier_places_OS": of.outlier_places_OS,
            "outlier_starts_S": matrix.starts(of.pattern.parts()[1], of.inputs),
        }
    return Coded(
        of.inputs,
        of.kept,
        of.grid.code_bits,
        of.codes_OB,
        of.bits_OB,
        of.scale_OG,
        of.zeros_OG,
        of.grid.zero_code,
        of.grid.levels(),
        **outliers,
    )
