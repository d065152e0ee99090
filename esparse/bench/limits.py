"""Measures the device's limits in the same run, to compare products with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from esparse.bench.timing import Clock, Protocolled, measure


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes per second of a copy (read and written), and operations per second of a dense product, by dtype."""

    copy_bytes_per_s: float
    flop_per_s: dict[str, float]

    def ms(self, *, weight_bytes: int, tokens: int, rows: int, inputs: int, dtype: str, sparse_cores: bool) -> float:
        """The least time of a product: its bytes by the copy's rate, or its operations by the dense product's rate.

        Sparse tensor cores skip half of the operations. Bytes: the weights as stored, inputs and outputs once.
        """
        element = {"int8": 1, "float8_e4m3fn": 1}.get(dtype, 4 if dtype == "float32" else 2)
        result = {"int8": 4, "float8_e4m3fn": 2}.get(dtype, element)
        moved = weight_bytes + tokens * (inputs * element + rows * result)
        operations = 2 * tokens * rows * inputs / (2 if sparse_cores else 1)
        return 1000 * max(moved / self.copy_bytes_per_s, operations / self.flop_per_s[dtype])

    def record(self) -> dict[str, Any]:
        return asdict(self)


def limits(device: torch.device, dtypes: Sequence[str], clock: Clock, how: Protocolled, *, size: int = 8192) -> Limits:
    """Measures the limits: a copy of `size`^2 x 32 bytes, and products of `size`^3 with random numbers."""
    from esparse.bench.products import dense_product, random_input, random_weight

    source = torch.empty(size * size * 8, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    # Without a graph, in which a copy engine would copy at two thirds of the rate (measured on an H200).
    copy = measure({"copy": [partial(target.copy_, source)]}, clock, replace(how, graph_below_ms=0.0))["copy"]
    moved = 2 * source.nbytes
    del source, target
    rates = {}
    for dtype in dtypes:
        weight_RI = random_weight(size, size, dtype, device)
        x_TI = random_input(size, size, dtype, device)
        product = dense_product(dtype)
        timing = measure({"dense": [partial(product, weight_RI, x_TI)]}, clock, how)["dense"]
        rates[dtype] = 2 * size**3 / timing.ms * 1000
    return Limits(moved / copy.ms * 1000, rates)
