"""A linear layer that computes from packed weights: some rows at a time get their zeros back, on a GPU by a kernel.

Shapes: T tokens, O outputs, I inputs, R rows of a tile, K survivors of a row, S salient ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from esparse.kernels.linear import packed_linear
from esparse.packed import matrix
from esparse.packed.matrix import PackedMatrix
from esparse.patterns import Pattern

TILE_BYTES = 2**22  # of the rows that have their zeros back at one time: they should stay in a core's cache


class PackedLinear(nn.Module):
    """A Linear (or Conv1D) whose weight is never there as a whole.

    It is made with the tensors as they lie on disk, on the meta device for instance; `settle` turns these into the form
    that is computed from, once they are filled.
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
        """`ordered`: the columns lie on disk in an order that lies there, too, and get back their own."""
        super().__init__()
        self.in_features, self.out_features, self.pattern = inputs, outputs, pattern
        # The kernels find a survivor by its group: not where columns got back their own order.
        self.for_kernels = len(pattern.parts()) == 1 and not ordered
        for name, shape in matrix.file_shapes(pattern, outputs, inputs).items():
            if name.endswith("index"):
                self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=device))
            else:
                self._keep_values(name, torch.empty(shape, dtype=dtype, device=device))
        if ordered:
            self.register_buffer("order", torch.empty(inputs, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None

    def settle(self) -> None:
        """Builds the form that is computed from, in place of the one on disk; ValueError for a damaged index."""
        device = self.values.device
        tensors = {name: value.cpu() for name, value in self.state_dict().items() if name != "bias"}
        packed = matrix.from_file(tensors, self.pattern, self.in_features)
        order_I = self._buffers.pop("order", None)
        self._take(packed if order_I is None else packed.restored(order_I.cpu().long()), device)
        for name in [name for name in self._buffers if name.endswith("index")]:
            del self._buffers[name]

    def _take(self, packed: PackedMatrix, device: torch.device) -> None:
        self._keep_values("values", packed.values_OK.to(device))
        self.register_buffer("bits", packed.bits_OB.to(device))
        if packed.salient_values_OS is not None and packed.salient_places_OS is not None:
            self._keep_values("salient_values", packed.salient_values_OS.to(device))
            self.register_buffer("salient_places", packed.salient_places_OS.to(device))

    def _keep_values(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The surviving values (O x K), for code that asks a layer's weight for its device or precision."""
        return self.values

    def packed(self) -> PackedMatrix:
        """The weights, sharing memory with the layer."""
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

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.for_kernels:
            return self.by_kernels(x)
        packed = self.packed()
        x_TI = x.reshape(-1, self.in_features)
        y_TO = x.new_empty(len(x_TI), self.out_features)
        rows = max(1, TILE_BYTES // (self.in_features * x.element_size()))
        for first in range(0, self.out_features, rows):
            end = min(first + rows, self.out_features)
            bias_R = None if self.bias is None else self.bias[first:end]
            y_TO[:, first:end] = linear(x_TI, packed.dense(first, end), bias_R)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def by_kernels(self, x: Tensor) -> Tensor:
        """The same, by the kernel for that many tokens (esparse/kernels/linear.py)."""
        (nm,) = self.pattern.parts()
        return packed_linear(self.values, self.bits, x, n=nm.n, m=nm.m, bias_R=self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.pattern}, bias={self.bias is not None}"
