"""The loops over codes against the decoded matrix, in double precision: with vectors and code by code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from esparse import option
from esparse.packed import quantised
from esparse.packed.quantised import QuantisedMatrix
from esparse.packed.quantised_layer import coded
from esparse.patterns import parse

pytest.importorskip("numba")

from esparse.kernels import coded as loops

PATTERNS = [("2:4", None), ("8:16", None), ("3:7", None), ("dense", None), ("2:4", "1:16"), ("8:16", "16:256")]
GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int4", {}),
    ("int3", {}),
    ("fp8", {}),
    ("nf4", {}),
    ("int8", {"symmetric": False}),
    ("int4", {"symmetric": False, "scale": "float32"}),
    ("int3", {"symmetric": False, "scale": "bfloat16"}),
    ("int4", {"bits": 6}),
    ("nf4", {"outlier_bits": None}),
    ("int4", {"outlier_bits": None, "symmetric": False}),
]
# whole words in a group, words that reach over groups, pieces of a row, a piece of a word
WIDTHS = [(64, 32), (100, 20), (2048 + 64, 64), (37, None)]


@pytest.fixture(autouse=True, params=[True, False], ids=["vectors", "codes"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways everywhere: LLVM makes something of the first one on every CPU."""
    monkeypatch.setattr(loops, "spreads", lambda: request.param)


def quantised_matrix(
    asked: tuple[str, str | None], quantise: str, changes: dict[str, Any], inputs: int, group: int | None
) -> tuple[QuantisedMatrix, torch.Tensor]:
    """A matrix as it comes from a file, and its values."""
    pattern, grid = parse(*asked), option("quantise", quantise, group=group, **changes)
    weight_OI = torch.randn(7, inputs, generator=torch.Generator().manual_seed(inputs))
    keep_OI = pattern.keep_top(weight_OI.abs())
    rounded_OI, scales = grid.nearest(weight_OI, keep_OI, pattern)
    tensors = quantised.to_file(rounded_OI + 0.0, pattern, grid, scales)
    return quantised.from_file(tensors, pattern, inputs, grid), rounded_OI + 0.0


@pytest.mark.parametrize(("inputs", "group"), WIDTHS)
@pytest.mark.parametrize(("quantise", "changes"), GRIDS, ids=str)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
def test_products_and_rows(
    asked: tuple[str, str | None], quantise: str, changes: dict[str, Any], inputs: int, group: int | None
) -> None:
    of, weight_OI = quantised_matrix(asked, quantise, changes, inputs, group)
    for rows in (slice(0, 7), slice(2, 5)):
        assert torch.equal(loops.dense(coded(of, loops), rows), weight_OI[rows])
    for tokens in (1, 2, 16):
        x_TI = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1))
        y_TO = loops.product(coded(of, loops), x_TI)
        expected_TO = x_TI.double() @ weight_OI.double().T
        assert y_TO.dtype == torch.float32 and y_TO.shape == (tokens, 7)
        assert (y_TO - expected_TO).norm() <= 1e-6 * expected_TO.norm()


def test_by_hand() -> None:
    # 2:4 of four columns in int4: codes 9 and 6 are levels 1 and -2, the scale is 0.5, columns 0 and 3 are kept.
    grid = option("quantise", "int4", group=None)
    codes_OB, bits_OB = torch.tensor([[0x69]], dtype=torch.uint8), torch.tensor([[0b1001]], dtype=torch.uint8)
    scales_OB = torch.tensor([[0.5]], dtype=torch.float16).view(torch.uint8)
    of = QuantisedMatrix(parse("2:4"), 4, grid, codes_OB, scales_OB, bits_OB=bits_OB)
    assert of.dense().tolist() == [[0.5, 0.0, 0.0, -1.0]]
    assert loops.product(coded(of, loops), torch.tensor([[3.0, 100.0, 100.0, 5.0]])).tolist() == [[1.5 - 5.0]]


def test_several_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    from esparse.kernels import compiled

    monkeypatch.setattr(compiled, "ALONE", 0)
    threads(3)
    of, weight_OI = quantised_matrix(("4:8", None), "int4", {}, 64, 32)
    x_TI = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loops.product(coded(of, loops), x_TI), x_TI @ weight_OI.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(loops.dense(coded(of, loops), slice(0, 7)), weight_OI)


def test_numba_may_not_convert_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NUMBA_CPU_NAME=generic says: scales and outliers in float16 are then converted before the loops."""
    monkeypatch.setattr(loops, "takes", lambda dtype: dtype != torch.float16)
    of, weight_OI = quantised_matrix(("2:4", "1:16"), "int8", {}, 64, 32)
    x_TI = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loops.product(coded(of, loops), x_TI), x_TI @ weight_OI.T, rtol=1e-5, atol=1e-5)
