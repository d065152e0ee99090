"""Packed experts of families that hold all experts in one 3-D parameter; an expert is made dense while it is used.

Shapes: E experts, O outputs, I inputs, K kept weights of a row, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esparse.packed import matrix
from esparse.packed.layer import with_zeros
from esparse.packed.matrix import PackedMatrix
from esparse.patterns import Pattern


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
    ) -> None:
        """`shape` is the parameter's; `transposed` means E x I x O; `ordered` as in PackedLinear."""
        super().__init__()
        self.pattern, self.transposed = pattern, transposed
        self.experts, outputs, self.inputs = (shape[0], *shape[:0:-1]) if transposed else shape
        for name, of_one in matrix.file_shapes(pattern, outputs, self.inputs).items():
            kind = torch.uint8 if name.endswith("index") else dtype
            self.register_buffer(name, torch.empty(self.experts, *of_one, dtype=kind, device=device))
        if ordered:
            self.register_buffer("order", torch.empty(self.experts, self.inputs, dtype=torch.int32, device=device))

    def settle(self) -> None:
        """Replaces the form on disk by the form in memory; raises ValueError for a damaged index."""
        device = next(self.buffers()).device
        tensors = {name: value.cpu() for name, value in self._buffers.items() if value is not None}
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

    def packed(self, expert: int) -> PackedMatrix:
        """The weights of one expert (O x I), sharing memory with all of them."""

        def of(name: str) -> Tensor | None:
            value = self._buffers.get(name)
            return None if value is None else value[expert]

        values_OK, bits_OB = of("values"), of("bits")
        assert values_OK is not None and bits_OB is not None
        return PackedMatrix(self.pattern, self.inputs, values_OK, bits_OB, of("salient_values"), of("salient_places"))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        packed = self.packed(int(expert))
        weight_OI = with_zeros(packed, slice(0, len(packed.values_OK)))
        return weight_OI.T if self.transposed else weight_OI

    def __len__(self) -> int:
        return self.experts

    def extra_repr(self) -> str:
        return f"{self.experts} experts, {self.pattern}"
