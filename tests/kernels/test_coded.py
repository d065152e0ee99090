"""The loops over codes against the decoded matrix, in double precision: with vectors and code by code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from esparse import option
from esparse.packed.quantised import QuantisedMatrix
from esparse.packed.quantised_layer import coded
from esparse.patterns import parse
from tests.kernels.quantised_matrices import GRIDS, PATTERNS, WIDTHS, quantised_matrix

pytest.importorskip("numba")

from esparse.kernels import coded as loops


@pytest.fixture(autouse=True, params=[True, False], ids=["vectors", "codes"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways everywhere: LLVM makes something of the first one on every CPU."""
    monkeypatch.setattr(loops, "spreads", lambda: request.param)


@pytest.mark.parametrize(("inputs", "group"), WIDTHS)
@pytest.mark.parametrize(("quantise", "changes"), GRIDS, ids=str)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
@pytest.mark.tries(6)
def test_products_and_rows(
    asked: tuple[str, str | None], quantise: str, changes: dict[str, Any], inputs: int, group: int | None
) -> None:
    of, weight_OI = quantised_matrix(asked, quantise, changes, inputs, group)
    for rows in (slice(0, 7), slice(2, 5)):
        assert torch.equal(loops.dense(coded(of), rows), weight_OI[rows])
    for tokens in (1, 2, 16):
        x_TI = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1))
        y_TO = loops.product(coded(of), x_TI)
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
    assert loops.product(coded(of), torch.tensor([[3.0, 100.0, 100.0, 5.0]])).tolist() == [[1.5 - 5.0]]


def test_several_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    from esparse.kernels import compiled

    monkeypatch.setattr(compiled, "ALONE", 0)
    threads(3)
    of, weight_OI = quantised_matrix(("4:8", None), "int4", {}, 64, 32)
    x_TI = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loops.product(coded(of), x_TI), x_TI @ weight_OI.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(loops.dense(coded(of), slice(0, 7)), weight_OI)


def test_numba_may_not_convert_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NUMBA_CPU_NAME=generic says: scales and outliers in float16 are then converted before the loops."""
    monkeypatch.setattr(loops, "takes", lambda dtype: dtype != torch.float16)
    of, weight_OI = quantised_matrix(("2:4", "1:16"), "int8", {}, 64, 32)
    x_TI = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loops.product(coded(of), x_TI), x_TI @ weight_OI.T, rtol=1e-5, atol=1e-5)
