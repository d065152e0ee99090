"""The packed product as an operator of PyTorch: whole for torch.compile and CUDA graphs, which cannot look into it.

Shapes: T tokens, O outputs, I inputs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from esparse.kernels.linear import packed_linear
from esparse.packed.layer import multiply
from esparse.packed.matrix import PackedMatrix
from esparse.patterns import Pattern, from_str

_LIBRARY = torch.library.Library("esparse", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor values, Tensor bits, Tensor? outlier_values, Tensor? outlier_places, "
    "Tensor? order, Tensor? bias, str pattern) -> Tensor"
)


@lru_cache
def _pattern(text: str) -> Pattern:
    return from_str(text)


def _packed_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    outlier_values: Tensor | None,
    outlier_places: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    pattern: str,
) -> Tensor:
    """x[..., order] @ W^T + bias: on a GPU by Triton's kernels, on a CPU by compiled loops for a few tokens."""
    asked = _pattern(pattern)
    x_TI = x.reshape(-1, x.shape[-1])
    if x.is_cuda and len(asked.parts()) == 1:
        (nm,) = asked.parts()
        y_TO = packed_linear(values, bits, x_TI, n=nm.n, m=nm.m, order_I=order, bias_R=bias)
    else:
        x_TI = x_TI if order is None else x_TI.index_select(-1, order)
        packed = PackedMatrix(asked, x.shape[-1], values, bits, outlier_values, outlier_places)
        y_TO = multiply(packed, x_TI, bias)
    return y_TO.contiguous().view(*x.shape[:-1], len(values))


_LIBRARY.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("esparse::packed_linear", lib=_LIBRARY)
def _shape(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    outlier_values: Tensor | None,
    outlier_places: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    pattern: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


packed_product = torch.ops.esparse.packed_linear
