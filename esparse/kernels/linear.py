"""A linear layer computed from packed weights: which kernel, by the number of tokens.

The matrix-vector kernel (gemv) is bound by the bytes of the weights, and for a few tokens ahead of everything; sparse
tensor cores (cuSPARSELt, 2:4 only) win where arithmetic counts; else a dense copy is expanded for the time of the call.

cuSPARSELt wants a format of its own, `blob`: the kept weights' values and then two bits of each one's place. Where its
values are those of the compute form in the same order, the compute form reads them there (`shared_values`), and the
second copy costs only the bits: 1/16 of the dense matrix in half precision. Else it costs the whole blob, 9/16.

Shapes: T tokens, R rows (outputs), I inputs, K kept weights of a row, B bytes of a row's bits.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from esparse.kernels.form import in_registers, to_dense, units

HALVES = (torch.float16, torch.bfloat16)
GEMV_TOKENS, REGISTER_TOKENS = 16, 64  # up to so many tokens the matrix-vector kernels are taken (`few_tokens`)


class Algorithm(NamedTuple):
    """How cuSPARSELt computes a product; 0, 1, -1 is what it does unasked."""

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

    `blob`: W as cuSPARSELt wants it (`compress`), for many tokens. Raises ValueError where shapes do not fit.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    inputs = x_TI.shape[1]
    few = few_tokens(x.dtype, inputs, n=n, m=m)
    way = kernel(len(x_TI), few, n=n, m=m, on_gpu=x.is_cuda, has_triton=has_triton(), has_blob=blob is not None)
    if way == "gemv":
        from esparse.kernels.gemv import matvec

        y_TR = matvec(values_RK, bits_RB, x_TI, n=n, m=m, order_I=order_I)
        return (y_TR if bias_R is None else y_TR + bias_R).view(*x.shape[:-1], -1)
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
    return y_TR.view(*x.shape[:-1], -1)


def few_tokens(dtype: torch.dtype, inputs: int, *, n: int, m: int) -> int:
    """How many tokens the matrix-vector kernels take: more if they can permute bytes in registers (registers.py)."""
    return REGISTER_TOKENS if in_registers(dtype, inputs, n, m) else GEMV_TOKENS


def kernel(tokens: int, few: int, *, n: int, m: int, on_gpu: bool, has_triton: bool, has_blob: bool) -> str:
    """gemv (up to `few` tokens), cusparselt, decode (to a dense copy, in Triton), or plain (likewise, in PyTorch)."""
    ours = on_gpu and has_triton and units(n, m) is not None
    if ours and tokens <= few:
        return "gemv"
    if has_blob:
        return "cusparselt"
    return "decode" if ours else "plain"


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def why_not_cusparselt(rows: int, inputs: int, *, n: int, m: int, dtype: torch.dtype) -> str | None:
    """Why sparse tensor cores cannot take a matrix; None where they can. Looks at no device."""
    if (n, m) != (2, 4):
        return f"sparse tensor cores know 2:4 only, not {n}:{m}"
    multiple = 16 if dtype in HALVES else 32
    if dtype not in (*HALVES, torch.int8, torch.float8_e4m3fn):
        return (
            f"cuSPARSELt takes float16, bfloat16, int8 and float8_e4m3fn here, not {str(dtype).removeprefix('torch.')}"
        )
    if rows % multiple or inputs % multiple:
        return f"cuSPARSELt wants rows and inputs in multiples of {multiple}, got {rows} x {inputs}"
    return None


def compress(dense_RI: Tensor) -> Tensor:
    """A 2:4 matrix as cuSPARSELt wants it; the dense matrix on the GPU can go afterwards."""
    return torch._cslt_compress(dense_RI)


def padded_tokens(tokens: int, dtype: torch.dtype) -> int:
    """The next number that cuSPARSELt takes: a multiple of 8 in half precision, of 16 in 8 bits."""
    multiple = 8 if dtype in HALVES else 16
    return -(-tokens // multiple) * multiple


def sparse_mm(
    blob: Tensor, x_TI: Tensor, bias_R: Tensor | None, algorithm: Algorithm, out_type: torch.dtype | None = None
) -> Tensor:
    """x @ W^T + bias (T x R) on sparse tensor cores; tokens are padded (`padded_tokens`)."""
    tokens = len(x_TI)
    x_TI = pad(x_TI, (0, 0, 0, padded_tokens(tokens, x_TI.dtype) - tokens))
    y_TR = torch._cslt_sparse_mm(
        blob,
        x_TI.t(),
        bias=bias_R,
        out_dtype=out_type,
        transpose_result=True,  # written as T x R at once; otherwise a copy would follow
        alg_id=algorithm.alg_id,
        split_k=algorithm.split_k,
        split_k_mode=algorithm.split_k_mode,
    )
    return y_TR[:tokens]


def shared_values(values_RK: Tensor, blob: Tensor) -> Tensor | None:
    """The values as a view of the blob's first part; None where they are not the same, and both must be kept.

    cuSPARSELt promises no layout, so that it is compared, not assumed.
    """
    if blob.dtype != values_RK.dtype or blob.numel() < values_RK.numel() or not blob.is_contiguous():
        return None
    view_RK = blob.view(-1)[: values_RK.numel()].view(values_RK.shape)
    return view_RK if torch.equal(view_RK, values_RK) else None


def resident_bytes(values_RK: Tensor, bits_RB: Tensor, blob: Tensor | None = None) -> int:
    """The bytes that a packed matrix holds, memory that is shared counted once."""
    storages = {
        s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in (values_RK, bits_RB, blob) if t is not None)
    }
    return sum(storages.values())
