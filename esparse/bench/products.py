"""The table of kernels that are timed against each other: dense, sparse tensor cores, and packed weights.

A weight is prepared once (compressed, packed); a call takes the prepared weight and the input, and returns x @ W^T.
Shapes: T tokens, R rows (outputs), I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from esparse.kernels import linear as packed
from esparse.kernels.form import to_form, units
from esparse.kernels.linear import Algorithm
from esparse.patterns import NM

DTYPES = ("float16", "bfloat16", "float32", "int8", "float8_e4m3fn")
# The largest allowed relative Frobenius error against the float64 product of the same weights.
TOLERANCE = {"float16": 1.5e-3, "bfloat16": 4e-3, "float32": 1e-4, "int8": 0.0, "float8_e4m3fn": 4e-3}


@dataclass(frozen=True, slots=True)
class Case:
    """One product: x (tokens x inputs) times W^T; W is rows x inputs with n:m along its rows."""

    tokens: int
    rows: int
    inputs: int
    dtype: str
    nm: NM

    @property
    def type(self) -> torch.dtype:
        return dtype(self.dtype)

    @property
    def bytes_of_activations(self) -> int:
        """Bytes of input and output together, roughly (8-bit inputs give wider outputs)."""
        return self.tokens * (self.rows + self.inputs) * self.type.itemsize


@dataclass(slots=True)
class Prepared:
    """A kernel's form of a weight, and its bytes."""

    parts: dict[str, Any]
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute a product from a pruned weight."""

    prepare: Callable[[Tensor, Case], Prepared]
    call: Callable[[Prepared, Tensor, Case, Algorithm], Tensor]
    why_not: Callable[[Case], str | None]
    sparse_cores: bool = False
    searched: bool = False
    gathers: bool = False  # takes inputs in another order, which `prepare` returns as "order"


def dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def random_weight(rows: int, inputs: int, name: str, device: torch.device, seed: int = 0) -> Tensor:
    """Random numbers, because a GPU is faster on zeros."""
    seeded = torch.Generator(device).manual_seed(seed)
    if name == "int8":
        return torch.randint(-100, 100, (rows, inputs), generator=seeded, dtype=torch.int8, device=device)
    return torch.randn(rows, inputs, generator=seeded, device=device).to(dtype(name))


def random_input(tokens: int, inputs: int, name: str, device: torch.device, seed: int = 1) -> Tensor:
    return random_weight(tokens, inputs, name, device, seed)


def pruned(weight_RI: Tensor, nm: NM) -> Tensor:
    """The weight with zeros (no -0.0) for all but the largest n of m."""
    keep_RI = nm.keep_top(weight_RI.float().abs())
    # float8 lacks masked_fill. A kept weight of value 0 becomes 1: a compressor would take it for a pruned one.
    nonzero_RI = torch.where(weight_RI.float() == 0, 1.0, weight_RI.float())
    return torch.where(keep_RI, nonzero_RI, 0.0).to(weight_RI.dtype)


def dense_product(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """PyTorch's dense product, as a function of W and x."""
    if name == "int8":
        return lambda weight_RI, x_TI: torch._int_mm(x_TI, weight_RI.t())
    if name == "float8_e4m3fn":

        def scaled(weight_RI: Tensor, x_TI: Tensor) -> Tensor:
            one = _one(x_TI.device)
            return torch._scaled_mm(x_TI, weight_RI.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        return scaled
    return lambda weight_RI, x_TI: linear(x_TI, weight_RI)


_ones: dict[torch.device, Tensor] = {}


def _one(device: torch.device) -> Tensor:
    if device not in _ones:
        _ones[device] = torch.ones((), device=device)
    return _ones[device]


def reference(weight_RI: Tensor, x_TI: Tensor) -> Tensor:
    return x_TI.double() @ weight_RI.double().T


def error(y_TR: Tensor, expected_TR: Tensor) -> float:
    """The relative Frobenius error; infinite if a value is NaN or Inf."""
    value = float((y_TR.double() - expected_TR).norm() / expected_TR.norm())
    return value if value == value else float("inf")


# --- how each kernel is prepared and called ---


def _cusparselt(weight_RI: Tensor, case: Case) -> Prepared:
    blob = packed.compress(weight_RI)
    return Prepared({"blob": blob}, blob.untyped_storage().nbytes())


def _cusparselt_call(prepared: Prepared, x_TI: Tensor, case: Case, algorithm: Algorithm) -> Tensor:
    out = {"int8": torch.int32, "float8_e4m3fn": torch.bfloat16}.get(case.dtype)
    return packed.sparse_mm(prepared.parts["blob"], x_TI, None, algorithm, out)


def _no_cusparselt(case: Case) -> str | None:
    why = packed.why_not_cusparselt(case.rows, case.inputs, n=case.nm.n, m=case.nm.m, dtype=case.type)
    if why is None and not torch.backends.cusparselt.is_available():
        return "this PyTorch was built without cuSPARSELt"
    if why is None and torch.cuda.get_device_capability() < (8, 0):
        return "this GPU has no sparse tensor cores (they begin with compute capability 8.0)"
    return why


def _cutlass(weight_RI: Tensor, case: Case) -> Prepared:
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    sparse = SparseSemiStructuredTensorCUTLASS.from_dense(weight_RI)
    return Prepared({"sparse": sparse}, sum(part.nbytes for part in (sparse.packed, sparse.meta) if part is not None))


def _no_cutlass(case: Case) -> str | None:
    if (case.nm.n, case.nm.m) != (2, 4) or case.type not in packed.HALVES:
        return "CUTLASS is measured at 2:4 in float16 and bfloat16 only"
    if torch.cuda.get_device_capability()[0] != 8:
        return "PyTorch's CUTLASS kernels for 2:4 run on compute capability 8.x only"
    return None if case.rows % 32 == 0 and case.inputs % 64 == 0 else "CUTLASS wants multiples of 32 x 64"


def _packed(weight_RI: Tensor, case: Case) -> Prepared:
    values_RK, bits_RB = to_form(weight_RI, weight_RI != 0)
    order_I = torch.randperm(case.inputs, device=weight_RI.device).to(torch.int32)
    parts = {"values": values_RK, "bits": bits_RB, "order": order_I}
    return Prepared(parts, values_RK.nbytes + bits_RB.nbytes)


def _packed_call(prepared: Prepared, x_TI: Tensor, case: Case, algorithm: Algorithm) -> Tensor:
    parts = prepared.parts
    return packed.packed_linear(parts["values"], parts["bits"], x_TI, n=case.nm.n, m=case.nm.m)


def _gathered_call(prepared: Prepared, x_TI: Tensor, case: Case, algorithm: Algorithm) -> Tensor:
    parts = prepared.parts
    return packed.packed_linear(parts["values"], parts["bits"], x_TI, n=case.nm.n, m=case.nm.m, order_I=parts["order"])


def _no_packed(case: Case) -> str | None:
    if case.type not in (*packed.HALVES, torch.float32):
        return "packed weights are multiplied in float16, bfloat16 and float32 only"
    if not packed.has_triton():
        return "Triton is not installed"
    if units(case.nm.n, case.nm.m) is None:
        return f"no packed kernel for {case.nm}"
    return None


def _no_gemv(case: Case) -> str | None:
    few = packed.few_tokens(case.type, case.inputs, n=case.nm.n, m=case.nm.m)
    if case.tokens > few:
        return f"the packed matrix-vector kernel is for at most {few} tokens"
    return _no_packed(case)


def _no_expanding(case: Case) -> str | None:
    if case.tokens <= packed.few_tokens(case.type, case.inputs, n=case.nm.n, m=case.nm.m):
        return "few tokens go through the packed matrix-vector kernel"
    return _no_packed(case)


KERNELS: dict[str, Kernel] = {
    "cusparselt": Kernel(_cusparselt, _cusparselt_call, _no_cusparselt, sparse_cores=True, searched=True),
    "cusparselt_default": Kernel(_cusparselt, _cusparselt_call, _no_cusparselt, sparse_cores=True),
    "cutlass": Kernel(_cutlass, lambda p, x, *_: linear(x, p.parts["sparse"]), _no_cutlass, sparse_cores=True),
    "packed": Kernel(_packed, _packed_call, _no_gemv),
    "packed_gather": Kernel(_packed, _gathered_call, _no_gemv, gathers=True),
    "decode": Kernel(_packed, _packed_call, _no_expanding),
}
