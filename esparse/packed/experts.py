"""Packed experts of families that hold all experts in one 3-D parameter; an expert is made dense while it is used.

Shapes: E experts, O outputs, I inputs, K kept weights of a row, B bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from esparse.packed import grid_sizes, matrix, quantised, quantised_layer
from esparse.packed.layer import with_zeros
from esparse.packed.matrix import PackedMatrix
from esparse.packed.quantised import QuantisedMatrix
from esparse.patterns import Pattern
from esparse.patterns.order import check_order
from esparse.quantise.grids import Grid


class PackedExperts(nn.Module):
    """Replaces a 3-D parameter: `experts[e]` returns the dense weight of expert e, which nothing here holds on to.

    It is built with empty tensors of the form on disk (packed/matrix.py), stacked over the experts; once they are
    loaded, `settle` turns them into the form in memory. transformers must compute expert by expert (`eager`).
    """

    _is_hf_initialized = True  # keeps transformers from filling it with random numbers as it does missing parameters

    def __init__(
        self,
        shape: tuple[int, int, int],
        pattern: Pattern,
        *,
        transposed: bool,
        ordered: bool,
        dtype: torch.dtype,
        device: torch.device,
        grid: Grid | None = None,
    ) -> None:
        """`shape` is the parameter's; `transposed` means E x I x O; `ordered` as in PackedLinear; `grid`: of codes."""
        super().__init__()
        self.pattern, self.transposed, self.grid = pattern, transposed, grid
        # Of the precision of dense experts, which codes do not have; never on "meta", which nothing leaves.
        self._like = torch.empty(0, dtype=dtype, device="cpu")
        self.experts, outputs, self.inputs = (shape[0], *shape[:0:-1]) if transposed else shape
        shapes = matrix.file_shapes(pattern, outputs, self.inputs)
        if grid is not None:
            shapes = grid_sizes.file_shapes(pattern, outputs, self.inputs, grid)
        for name, of_one in shapes.items():
            kind = dtype if name.endswith("values") else torch.uint8
            self.register_buffer(name, torch.empty(self.experts, *of_one, dtype=kind, device=device))
        if ordered:
            self.register_buffer("order", torch.empty(self.experts, self.inputs, dtype=torch.int32, device=device))

    def settle(self) -> None:
        """Replaces the form on disk by the form in memory; raises ValueError for a damaged index or scale."""
        device = next(self.buffers()).device
        tensors = {name: value.cpu() for name, value in self._buffers.items() if value is not None}
        if self.grid is not None:
            self._settle_codes(tensors, self.grid, device)
            return
        orders_EI = tensors.pop("order", None)
        settled = []
        for expert in range(self.experts):
            one = matrix.from_file({name: value[expert] for name, value in tensors.items()}, self.pattern, self.inputs)
            settled.append(one if orders_EI is None else one.restored(orders_EI[expert].long()))
        for name in list(self._buffers):
            if name.endswith("index") or name == "order":
                del self._buffers[name]
        self.register_buffer("bits", torch.stack([one.bits_OB for one in settled]).to(device))
        if orders_EI is not None:
            self.values = torch.stack([one.values_OK for one in settled]).to(device)
        places = [one.outlier_places_OS for one in settled if one.outlier_places_OS is not None]
        if places:
            self.register_buffer("salient_places", torch.stack(places).to(device))

    def _settle_codes(self, tensors: dict[str, Tensor], grid: Grid, device: torch.device) -> None:
        """Codes stay in the order in which their groups were cut; `order` puts each expert's columns back."""
        order_EI = tensors.pop("order", None)
        for order_I in () if order_EI is None else order_EI:
            check_order(order_I, self.inputs)
        settled = []
        for expert in range(self.experts):
            one = {name: value[expert] for name, value in tensors.items()}
            settled.append(quantised.from_file(one, self.pattern, self.inputs, grid).tensors())
        self._buffers.clear()
        for name in settled[0]:
            self.register_buffer(name, torch.stack([one[name] for one in settled]).to(device))
        if order_EI is not None:
            self.register_buffer("order", order_EI.to(device))

    def quantised(self, expert: int, grid: Grid) -> QuantisedMatrix:
        """The codes of one expert, with its columns in group order; they share memory with all of them."""
        tensors = {name: value[expert] for name, value in self._buffers.items() if value is not None}
        return QuantisedMatrix.of(tensors, self.pattern, self.inputs, grid)

    def packed(self, expert: int) -> PackedMatrix:
        """The weights of one expert (O x I), sharing memory with all of them."""

        def of(name: str) -> Tensor | None:
            value = self._buffers.get(name)
            return None if value is None else value[expert]

        values_OK, bits_OB = of("values"), of("bits")
        assert values_OK is not None and bits_OB is not None
        return PackedMatrix(self.pattern, self.inputs, values_OK, bits_OB, of("salient_values"), of("salient_places"))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        if self.grid is None:
            packed = self.packed(int(expert))
            weight_OI = with_zeros(packed, slice(0, len(packed.values_OK)))
        else:
            codes = self.quantised(int(expert), self.grid)
            weight_OI = quantised_layer.with_zeros(codes, slice(0, len(codes.codes_OB)), self._like.dtype)
            if (orders_EI := self._buffers.get("order")) is not None:
                weight_OI = torch.empty_like(weight_OI).index_copy_(1, orders_EI[int(expert)].long(), weight_OI)
        return weight_OI.T if self.transposed else weight_OI

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        super()._apply(fn, recurse)
        self._like = fn(self._like)
        return self

    def __len__(self) -> int:
        return self.experts

    def extra_repr(self) -> str:
        return f"{self.experts} experts, {self.pattern}"
