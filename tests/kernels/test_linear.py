"""A packed linear layer by every way that can be gone here, and the choice among them."""

from __future__ import annotations

import pytest
import torch

from esparse.kernels import linear as packed
from esparse.kernels.form import to_form
from esparse.kernels.linear import (
    few_tokens,
    few_tokens_of,
    kernel,
    packed_linear,
    resident_bytes,
    shared_values,
    why_not_cusparselt,
)
from tests.kernels.packed import DEVICE, ON_GPU_TOO, matrix

pytestmark = ON_GPU_TOO


@pytest.mark.parametrize("way", ["gemv", "decode", "plain"])
@pytest.mark.parametrize("shape", [(72,), (3, 72), (2, 3, 72)])
@pytest.mark.parametrize("extras", [False, True])
def test_every_way_gives_the_masked_product(
    way: str, shape: tuple[int, ...], extras: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "plain":
        pytest.importorskip("triton")
    dense_RI, values_RK, bits_RB = matrix(4, 8, 10, 72)
    seeded = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=seeded).to(DEVICE)
    order_I = torch.randperm(72, generator=seeded).to(DEVICE) if extras else None
    bias_R = torch.randn(10, generator=seeded).to(DEVICE) if extras else None
    expected = (x if order_I is None else x[..., order_I]).double() @ dense_RI.double().T
    if bias_R is not None:
        expected += bias_R
    monkeypatch.setattr(packed, "kernel", lambda *_, **__: way)
    y = packed_linear(values_RK, bits_RB, x, n=4, m=8, order_I=order_I, bias_R=bias_R)
    assert y.shape == (*shape[:-1], 10)
    assert (y - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("way", ["decode", "plain"])
def test_no_tokens(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "decode":
        pytest.importorskip("triton")
    _, values_RK, bits_RB = matrix(4, 8, 10, 72)
    monkeypatch.setattr(packed, "kernel", lambda *_, **__: way)
    assert packed_linear(values_RK, bits_RB, torch.empty(2, 0, 72, device=DEVICE), n=4, m=8).shape == (2, 0, 10)


def test_the_choice() -> None:
    def chosen(tokens: int, n: int = 2, m: int = 4, **there: bool) -> str:
        return kernel(tokens, 16, n=n, m=m, **({"on_gpu": True, "has_triton": True, "has_blob": True} | there))

    assert few_tokens(torch.float32, 64, n=2, m=4) == few_tokens(torch.bfloat16, 72, n=2, m=4) == 16
    assert few_tokens(torch.bfloat16, 64, n=8, m=16) == 64
    assert [chosen(tokens) for tokens in (1, 16, 17, 4096)] == ["gemv", "gemv", "cusparselt", "cusparselt"]
    assert [chosen(tokens, 8, 16, has_blob=False) for tokens in (16, 17)] == ["gemv", "decode"]
    assert [chosen(0, has_blob=blob) for blob in (True, False)] == ["decode", "decode"]  # an expert without tokens
    assert chosen(1, has_triton=False) == "cusparselt"
    assert chosen(1, has_triton=False, has_blob=False) == "plain"
    assert chosen(1, on_gpu=False, has_blob=False) == "plain"
    assert chosen(1, 24, 32, has_blob=False) == "plain"


def test_tensors_that_registers_cannot_load_have_fewer_tokens() -> None:
    """17 to 64 tokens went to the matrix-vector kernels then, which refused them."""
    _, values_RK, bits_RB = (part.cpu() for part in matrix(4, 8, 10, 64, torch.bfloat16))
    x_TI = torch.empty(20, 64, dtype=torch.bfloat16)
    shifted_RK = torch.empty(values_RK.numel() + 1, dtype=torch.bfloat16)[1:].view(values_RK.shape)
    found = [
        few_tokens_of(values, bits, x_TI, n=4, m=8)
        for values, bits in (
            (values_RK, bits_RB),
            (shifted_RK, bits_RB),
            (values_RK.repeat(1, 2)[:, ::2], bits_RB),
            (values_RK, bits_RB.repeat(1, 2)[:, ::2]),
        )
    ]
    assert found == [64, 16, 16, 16]


def test_weights_and_inputs_of_two_dtypes_are_refused() -> None:
    _, values_RK, bits_RB = matrix(4, 8, 10, 72)
    with pytest.raises(ValueError, match=r"weights are torch\.float32 and the inputs torch\.bfloat16"):
        packed_linear(values_RK, bits_RB, torch.zeros(3, 72, dtype=torch.bfloat16, device=DEVICE), n=4, m=8)


@pytest.mark.parametrize("tokens", [8, 13])
@pytest.mark.parametrize("kind", ["as it is", "columns of a wider tensor", "an odd address", "transposed"])
def test_sparse_tensor_cores_get_whole_rows_and_no_copy_of_them(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuSPARSELt reads no strides: it takes rows that lie one behind the other."""
    given: list[torch.Tensor] = []

    def product(blob: torch.Tensor, x_IT: torch.Tensor, **_: object) -> torch.Tensor:
        given.append(x_IT.t())
        return torch.zeros(x_IT.shape[1], len(blob), dtype=x_IT.dtype)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    x_TI = {
        "as it is": torch.randn(tokens, 32).half(),
        "columns of a wider tensor": torch.randn(tokens, 64).half()[:, :32],
        "an odd address": torch.randn(tokens * 32 + 1).half()[1:].view(tokens, 32),
        "transposed": torch.randn(32, tokens).half().T,
    }[kind]
    y_TR = packed.sparse_mm(torch.empty(16, 32), x_TI, None, packed.Algorithm())
    assert y_TR.shape == (tokens, 16)
    (got_TI,) = given
    assert got_TI.is_contiguous() and got_TI.data_ptr() % 16 == 0 and len(got_TI) % 8 == 0
    assert torch.equal(got_TI[:tokens], x_TI)
    assert (got_TI.data_ptr() == x_TI.data_ptr()) == (kind == "as it is" and tokens == 8)


def test_what_sparse_tensor_cores_take() -> None:
    half, fp8 = torch.bfloat16, torch.float8_e4m3fn
    assert why_not_cusparselt(4096, 11008, n=2, m=4, dtype=half) is None
    assert why_not_cusparselt(16, 48, n=2, m=4, dtype=half) is None
    assert "2:4 only, not 4:8" in str(why_not_cusparselt(4096, 4096, n=4, m=8, dtype=half))
    assert "multiples of 16, got 4096 x 4104" in str(why_not_cusparselt(4096, 4104, n=2, m=4, dtype=half))
    assert "multiples of 32" in str(why_not_cusparselt(4096, 4112, n=2, m=4, dtype=fp8))
    assert "not float32" in str(why_not_cusparselt(4096, 4096, n=2, m=4, dtype=torch.float32))


def test_a_blob_with_the_same_values_in_front_is_shared() -> None:
    _, values_RK, bits_RB = matrix(2, 4, 32, 64, torch.float16)
    values_RK, bits_RB = values_RK.cpu(), bits_RB.cpu()
    places = torch.randint(0, 9, (32 * 4,)).half()  # of two bits for each of 32 x 32 survivors
    blob = torch.cat([values_RK.flatten(), places]).view(32, 36)
    dense = 32 * 64 * 2
    assert resident_bytes(values_RK, bits_RB) == dense * 9 // 16
    assert resident_bytes(values_RK, bits_RB, blob) == dense * 18 // 16
    shared_RK = shared_values(values_RK, blob)
    assert shared_RK is not None and torch.equal(shared_RK, values_RK)
    assert resident_bytes(shared_RK, bits_RB, blob) == dense * 10 // 16
    swapped = blob.clone()
    swapped[0, 0], swapped[0, 1] = blob[0, 1], blob[0, 0]
    assert shared_values(values_RK, swapped) is None
    assert shared_values(values_RK, blob[:8]) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_sparse_tensor_cores(tokens: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 0) or not torch.backends.cusparselt.is_available():
        pytest.skip("no sparse tensor cores")
    dense_RI, values_RK, _ = matrix(2, 4, 256, 512, dtype)
    x_TI = torch.randn(tokens, 512, device=DEVICE).to(dtype)
    bias_R = torch.randn(256, device=DEVICE).to(dtype)
    blob = packed.compress(dense_RI)
    y_TR = packed.sparse_mm(blob, x_TI, bias_R, packed.Algorithm())
    expected_TR = x_TI.double() @ dense_RI.double().T + bias_R
    assert y_TR.is_contiguous() and y_TR.shape == (tokens, 256)
    assert (y_TR - expected_TR).norm() / expected_TR.norm() < 8e-3
    assert to_form(dense_RI, dense_RI != 0)[0].shape == values_RK.shape
    assert shared_values(values_RK, blob) is not None  # fails where the library's layout has changed: then 9/16 more
