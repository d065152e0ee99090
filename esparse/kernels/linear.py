"""A linear layer's product from packed weights; the number of tokens decides which kernel computes it.

The matrix-vector kernel (gemv) is bound by the bytes of the weights and is the fastest for a few tokens. Sparse tensor
cores (cuSPARSELt, 2:4 only) win for many tokens. Otherwise a dense copy is expanded for the time of the call.

cuSPARSELt needs a format of its own, `blob`: the values of the kept weights, then two bits per kept weight for its
place. If its values are those of the compute form in the same order, the compute form shares them (`shared_values`),
and the second copy costs only the bits: 1/16 of the dense matrix in half precision. Else it costs the whole blob, 9/16.

Shapes: T tokens, R rows (outputs), I inputs, K kept weights of a row, B bytes of a row's bits.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from esparse.kernels.form import in_place, in_registers, to_dense, units

HALVES = (torch.float16, torch.bfloat16)
ALIGNED = 16  # bytes of which cuSPARSELt takes multiples as addresses
GEMV_TOKENS, REGISTER_TOKENS = 16, 64  # most tokens for the matrix-vector kernels (`few_tokens`)


class Algorithm(NamedTuple):
    """How cuSPARSELt computes a product; its default is 0, 1, -1."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


def packed_linear(
    values_RK: Tensor,
    bits_RB: Tensor,
    x: Tensor,
    *,
    n: int,
    m: int,
    order_I: Tensor | None = None,
    bias_R: Tensor | None = None,
    blob: Tensor | None = None,
    algorithm: Algorithm | None = None,
) -> Tensor:
    """x (... x I) @ W^T + bias (... x R), where column i of W belongs to input order[i] of x.

    `blob`: W in cuSPARSELt's format (`compress`), for many tokens. Raises ValueError if shapes do not fit.
    """
    if values_RK.dtype != x.dtype:
        raise ValueError(f"the weights are {values_RK.dtype} and the inputs {x.dtype}: give both one dtype")
    x_TI = x.reshape(-1, x.shape[-1])
    inputs = x_TI.shape[1]
    few = few_tokens_of(values_RK, bits_RB, x_TI, n=n, m=m)
    way = kernel(len(x_TI), few, n=n, m=m, on_gpu=x.is_cuda, has_triton=has_triton(), has_blob=blob is not None)
    if way == "gemv":
        from esparse.kernels.gemv import matvec

        y_TR = matvec(values_RK, bits_RB, x_TI, n=n, m=m, order_I=order_I)
        return (y_TR if bias_R is None else y_TR + bias_R).view(*x.shape[:-1], len(values_RK))
    if order_I is not None:
        x_TI = x_TI[:, order_I]
    if way == "cusparselt":
        assert blob is not None
        y_TR = sparse_mm(blob, x_TI, bias_R, algorithm or Algorithm())
    elif way == "decode":
        from esparse.kernels.decode import decode

        y_TR = linear(x_TI, decode(values_RK, bits_RB, inputs, n=n, m=m), bias_R)
    else:
        y_TR = linear(x_TI, to_dense(values_RK, bits_RB, inputs), bias_R)
    return y_TR.view(*x.shape[:-1], len(values_RK))


def few_tokens(dtype: torch.dtype, inputs: int, *, n: int, m: int) -> int:
    """The most tokens that the matrix-vector kernels take; more for the kernels in registers.py."""
    return REGISTER_TOKENS if in_registers(dtype, inputs, n, m) else GEMV_TOKENS


def few_tokens_of(values_RK: Tensor, bits_RB: Tensor, x_TI: Tensor, *, n: int, m: int) -> int:
    """The same for these tensors, which may lie in memory as the kernels in registers.py do not take them."""
    lie_well = in_place(values_RK, bits_RB)
    return few_tokens(x_TI.dtype, x_TI.shape[1], n=n, m=m) if lie_well else GEMV_TOKENS


def kernel(tokens: int, few: int, *, n: int, m: int, on_gpu: bool, has_triton: bool, has_blob: bool) -> str:
    """The kernel: gemv (up to `few` tokens), cusparselt, decode (dense copy by Triton) or plain (by PyTorch)."""
    ours = on_gpu and has_triton and units(n, m) is not None
    if ours and 1 <= tokens <= few:
        return "gemv"
    if has_blob and tokens:
        return "cusparselt"
    return "decode" if ours else "plain"


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def why_not_cusparselt(rows: int, inputs: int, *, n: int, m: int, dtype: torch.dtype) -> str | None:
    """Why sparse tensor cores cannot take a matrix; None if they can. Does not depend on the device."""
    if (n, m) != (2, 4):
        return f"sparse tensor cores support 2:4 only, not {n}:{m}"
    multiple = 16 if dtype in HALVES else 32
    if dtype not in (*HALVES, torch.int8, torch.float8_e4m3fn):
        return (
            f"cuSPARSELt takes float16, bfloat16, int8 and float8_e4m3fn here, not {str(dtype).removeprefix('torch.')}"
        )
    if rows % multiple or inputs % multiple:
        return f"cuSPARSELt needs rows and inputs in multiples of {multiple}, got {rows} x {inputs}"
    return None


def compress(dense_RI: Tensor) -> Tensor:
    """A 2:4 matrix in cuSPARSELt's format; the dense matrix on the GPU may be freed afterwards."""
    return torch._cslt_compress(dense_RI)


def padded_tokens(tokens: int, dtype: torch.dtype) -> int:
    """The number of tokens rounded up to what cuSPARSELt takes: a multiple of 8 in half precision, of 16 in 8 bits."""
    multiple = 8 if dtype in HALVES else 16
    return -(-tokens // multiple) * multiple


def sparse_mm(
    blob: Tensor, x_TI: Tensor, bias_R: Tensor | None, algorithm: Algorithm, out_type: torch.dtype | None = None
) -> Tensor:
    """x @ W^T + bias (T x R) on sparse tensor cores; pads the tokens (`padded_tokens`)."""
    tokens = len(x_TI)
    missing = padded_tokens(tokens, x_TI.dtype) - tokens
    if missing:
        x_TI = pad(x_TI, (0, 0, 0, missing))
    elif not x_TI.is_contiguous() or x_TI.data_ptr() % ALIGNED:  # strides are not read, and addresses must be multiples
        x_TI = x_TI.clone(memory_format=torch.contiguous_format)
    y_TR = torch._cslt_sparse_mm(
        blob,
        x_TI.t(),
        bias=bias_R,
        out_dtype=out_type,
        transpose_result=True,  # writes T x R directly, without a copy
        alg_id=algorithm.alg_id,
        split_k=algorithm.split_k,
        split_k_mode=algorithm.split_k_mode,
    )
    return y_TR[:tokens]


def shared_values(values_RK: Tensor, blob: Tensor) -> Tensor | None:
    """The values as a view of the blob's first part; None if they differ, so that both must be kept.

    cuSPARSELt guarantees no layout, so the bytes are compared.
    """
    if blob.dtype != values_RK.dtype or blob.numel() < values_RK.numel() or not blob.is_contiguous():
        return None
    view_RK = blob.view(-1)[: values_RK.numel()].view(values_RK.shape)
    return view_RK if torch.equal(view_RK, values_RK) else None


def resident_bytes(values_RK: Tensor, bits_RB: Tensor, blob: Tensor | None = None) -> int:
    """The bytes of a packed matrix; counts shared memory once."""
    storages = {
        s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in (values_RK, bits_RB, blob) if t is not None)
    }
    return sum(storages.values())
