"""Every Triton kernel against the plain computation in double precision, in the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.packed import DEVICE, ON_GPU_TOO, matrix

pytest.importorskip("triton")

from esparse.kernels import registers
from esparse.kernels.decode import decode
from esparse.kernels.form import to_dense, to_form
from esparse.kernels.gemv import Tile, candidates, fastest, matvec
from esparse.kernels.norm import norm, plain_norm

pytestmark = ON_GPU_TOO
PATTERNS = [(2, 4), (4, 8), (8, 16), (16, 32), (1, 4), (3, 4), (3, 6), (15, 30), (1, 2), (5, 7)]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TILES = [Tile("gather", 8, 8, 4), Tile("gather", 4, 2, 4, 3), Tile("expand", 16, 4, 4), Tile("expand", 16, 2, 4, 2)]


def off(y_TR: torch.Tensor, x_TI: torch.Tensor, dense_RI: torch.Tensor) -> float:
    expected_TR = x_TI.double() @ dense_RI.double().T
    return float((y_TR.double() - expected_TR).norm() / expected_TR.norm())


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.kernel}-{tile.split}")
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize(("rows", "inputs"), [(16, 64), (9, 100)])  # the second: tails of groups, of tiles, of bytes
def test_any_pattern(n: int, m: int, rows: int, inputs: int, tile: Tile) -> None:
    dense_RI, values_RK, bits_RB = matrix(n, m, rows, inputs)
    x_TI = torch.randn(3, inputs, device=DEVICE)
    assert off(matvec(values_RK, bits_RB, x_TI, n=n, m=m, tile=tile), x_TI, dense_RI) < 1e-6


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.kernel}-{tile.split}")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_tokens_and_dtypes(tokens: int, dtype: torch.dtype, tile: Tile) -> None:
    dense_RI, values_RK, bits_RB = matrix(8, 16, 18, 96, dtype)
    x_TI = torch.randn(tokens, 96, device=DEVICE).to(dtype)
    y_TR = matvec(values_RK, bits_RB, x_TI, n=8, m=16, tile=tile)
    assert y_TR.dtype == dtype and y_TR.shape == (tokens, 18)
    assert off(y_TR, x_TI, dense_RI) < ROUNDING[dtype]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.kernel}-{tile.split}")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_inputs_in_another_order(index: torch.dtype, tile: Tile) -> None:
    dense_RI, values_RK, bits_RB = matrix(2, 4, 10, 72)
    order_I = torch.randperm(72, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x_TI = torch.randn(2, 72, device=DEVICE)
    y_TR = matvec(values_RK, bits_RB, x_TI, n=2, m=4, order_I=order_I.to(index), tile=tile)
    assert off(y_TR, x_TI[:, order_I], dense_RI) < 1e-6


def test_by_hand() -> None:
    values_RK = torch.tensor([[10.0, 20.0], [30.0, 40.0]], device=DEVICE)
    bits_RB = torch.tensor([[0b1001], [0b0110]], dtype=torch.uint8, device=DEVICE)
    x_TI = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=DEVICE)
    assert matvec(values_RK, bits_RB, x_TI, n=2, m=4).tolist() == [[10 + 80.0, 60 + 120.0]]


IN_REGISTERS = [
    *(("select", n, m, rows, depth, split) for n, m in [(2, 4)] for rows, depth, split in [(8, 4, 1), (4, 2, 3)]),
    *(
        ("spread", n, m, rows, 2, split)
        for n, m in [(2, 4), (1, 2), (4, 8), (8, 16)]
        for rows, split in [(16, 1), (16, 3)]
    ),
]


@pytest.mark.tries(6)  # both kernels
@pytest.mark.parametrize(("kernel", "n", "m", "tile_rows", "depth", "split"), IN_REGISTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 11, pytest.param(33, marks=pytest.mark.slow)])
def test_bytes_permuted_in_registers(
    tokens: int, dtype: torch.dtype, kernel: str, n: int, m: int, tile_rows: int, depth: int, split: int
) -> None:
    for rows, inputs in ((16, 64), (9, 112)):  # the second: tails of tiles
        dense_RI, values_RK, bits_RB = matrix(n, m, rows, inputs, dtype, seed=tokens)
        x_TI = torch.randn(tokens, inputs, device=DEVICE).to(dtype)
        order_I = torch.randperm(inputs).to(DEVICE)
        tile = Tile(kernel, tile_rows, depth, 4, split)
        y_TR = matvec(values_RK, bits_RB, x_TI, n=n, m=m, tile=tile)
        assert y_TR.dtype == dtype and y_TR.shape == (tokens, rows)
        assert off(y_TR, x_TI, dense_RI) < ROUNDING[dtype]
        ordered_TR = matvec(values_RK, bits_RB, x_TI, n=n, m=m, tile=tile, order_I=order_I)
        assert off(ordered_TR, x_TI[:, order_I], dense_RI) < ROUNDING[dtype]


def test_every_choice_of_two_among_four_is_selected() -> None:
    """Six rows keep each pair of the columns: y is the sum of two inputs, exactly."""
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    dense_RI = torch.zeros(6, 16, dtype=torch.bfloat16)
    for row, pair in enumerate(pairs):
        for four in range(4):
            dense_RI[row, [4 * four + column for column in pair]] = 1.0
    values_RK, bits_RB = (part.to(DEVICE) for part in to_form(dense_RI, dense_RI != 0))
    x_TI = torch.arange(1, 17, device=DEVICE)[None].to(torch.bfloat16)
    expected = [sum(4 * four + i + 1 + 4 * four + j + 1 for four in range(4)) for i, j in pairs]
    for kernel, rows in (("select", 8), ("spread", 16)):
        y_TR = matvec(values_RK, bits_RB, x_TI, n=2, m=4, tile=Tile(kernel, rows, 2, 4))
        assert y_TR.tolist() == [expected], kernel


def test_what_registers_cannot_take() -> None:
    def taken(n: int, m: int, inputs: int, dtype: torch.dtype) -> bool:
        _, values_RK, bits_RB = matrix(n, m, 4, inputs, dtype)
        return registers.fits(values_RK, bits_RB, torch.ones(1, inputs, device=DEVICE, dtype=dtype), n=n, m=m)

    assert taken(2, 4, 64, torch.bfloat16) and taken(8, 16, 64, torch.float16)
    assert not taken(2, 4, 64, torch.float32)
    assert not taken(2, 4, 72, torch.bfloat16)  # rows that are no whole runs of 16
    assert not taken(1, 4, 64, torch.bfloat16) and not taken(16, 32, 64, torch.bfloat16)


@pytest.mark.tries(1)
@pytest.mark.parametrize(("rows", "tokens"), [(1000, 1), (4096, 5), (16384, 16)])
def test_every_tile_that_is_tried_is_right(rows: int, tokens: int) -> None:
    for n, m, dtype in ((2, 4, torch.bfloat16), (4, 8, torch.float32), (1, 4, torch.float32), (16, 32, torch.float32)):
        tiles = candidates(rows, 128, tokens, n=n, m=m, in_registers=dtype == torch.bfloat16)
        assert len(set(tiles)) == len(tiles)
        dense_RI, values_RK, bits_RB = matrix(n, m, 20, 128, dtype)
        x_TI = torch.randn(tokens, 128, device=DEVICE).to(dtype)
        for tile in tiles:
            y_TR = matvec(values_RK, bits_RB, x_TI, n=n, m=m, tile=tile)
            assert off(y_TR, x_TI, dense_RI) < ROUNDING[dtype], tile


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_decode_gives_the_dense_matrix(n: int, m: int, dtype: torch.dtype) -> None:
    for rows, inputs in ((10, 64), (7, 300)):
        dense_RI, values_RK, bits_RB = matrix(n, m, rows, inputs, dtype)
        out_RI = torch.full((rows, inputs), float("nan"), dtype=dtype, device=DEVICE)
        assert torch.equal(decode(values_RK, bits_RB, inputs, n=n, m=m, out_RI=out_RI), dense_RI)
        assert torch.equal(to_dense(values_RK, bits_RB, inputs), dense_RI)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("hidden", [64, 100, 20000])
@pytest.mark.parametrize("ordered", [False, True])
def test_norm(hidden: int, ordered: bool, dtype: torch.dtype) -> None:
    seeded = torch.Generator().manual_seed(hidden)
    x_TH = (3 * torch.randn(2, 3, hidden, generator=seeded)).to(DEVICE, dtype)
    weight_H = torch.randn(hidden, generator=seeded).to(DEVICE, dtype)
    order_I = torch.randperm(hidden, generator=seeded).to(DEVICE) if ordered else None
    normed_TI = norm(x_TH, weight_H, 1e-5, order_I)
    # the formula, in double precision: y_i = x_i / sqrt(mean(x^2) + eps) * weight_i
    x64 = x_TH.double()
    expected_TI = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight_H.double()
    expected_TI = expected_TI if order_I is None else expected_TI[..., order_I]
    for y_TI in (normed_TI, plain_norm(x_TH, weight_H, 1e-5, order_I)):
        assert y_TI.shape == x_TH.shape and y_TI.dtype == dtype
        assert (y_TI.double() - expected_TI).norm() / expected_TI.norm() < ROUNDING[dtype]


def test_plain_norm_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer = LlamaRMSNorm(64, eps=1e-6).to(torch.bfloat16)
    layer.weight.data = torch.randn(64).to(torch.bfloat16)
    x_TH = torch.randn(5, 64).to(torch.bfloat16)
    assert torch.equal(plain_norm(x_TH, layer.weight, 1e-6), layer(x_TH))


def test_what_the_kernels_cannot_take_is_said() -> None:
    _, values_RK, bits_RB = matrix(2, 4, 4, 64)
    with pytest.raises(ValueError, match="no kernel for 2:64"):
        matvec(values_RK, bits_RB, torch.ones(1, 64, device=DEVICE), n=2, m=64)
    with pytest.raises(ValueError, match="1 to 16 tokens here, got 17"):
        matvec(values_RK, bits_RB, torch.ones(17, 64, device=DEVICE), n=2, m=4)  # float32
    with pytest.raises(ValueError, match="does not fit 72 inputs"):
        matvec(values_RK, bits_RB, torch.ones(1, 72, device=DEVICE), n=2, m=4)
    with pytest.raises(ValueError, match="no kernel for 24:32"):
        decode(values_RK, bits_RB, 64, n=24, m=32)


@pytest.mark.skipif(DEVICE == "cuda", reason="what happens where nothing can be timed")
def test_without_a_gpu_the_first_tile_is_taken() -> None:
    assert fastest("key", TILES, lambda tile: pytest.fail("it was called")) == TILES[0]
