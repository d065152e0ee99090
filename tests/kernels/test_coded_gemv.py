"""The Triton kernels over codes against the decoded matrix in double precision, in the interpreter without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esparse.kernels.form import Coded
from esparse.packed.quantised_layer import coded
from tests.kernels.packed import DEVICE, ON_GPU_TOO
from tests.kernels.quantised_matrices import GRIDS, PATTERNS, WIDTHS, quantised_matrix

pytest.importorskip("triton")

from esparse.kernels import coded_gemv
from esparse.kernels.tiles import Tile

pytestmark = ON_GPU_TOO
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TILES = [Tile("coded", 16, 4, 4), Tile("coded", 16, 2, 4, 3)]


def on_device(of: Coded) -> Coded:
    return Coded(*(part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in of))


def nm(asked: tuple[str, str | None]) -> dict[str, int]:
    n, _, m = asked[0].partition(":")
    return {"n": int(n), "m": int(m)} if m else {"n": 1, "m": 1}


@pytest.mark.parametrize(("inputs", "group"), [(64, 32), (100, 20), (37, None)])
@pytest.mark.parametrize(("quantise", "changes"), GRIDS, ids=str)
@pytest.mark.parametrize("asked", PATTERNS, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"split{tile.split}")
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_products(
    asked: tuple[str, str | None],
    quantise: str,
    changes: dict[str, Any],
    inputs: int,
    group: int | None,
    tile: Tile,
    tokens: int,
) -> None:
    of, weight_OI = quantised_matrix(asked, quantise, changes, inputs, group)
    x_TI = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y_TO = coded_gemv.product(on_device(coded(of)), x_TI, **nm(asked), tile=tile)
    expected_TO = x_TI.double() @ weight_OI.double().T.to(DEVICE)
    assert y_TO.dtype == torch.float32 and y_TO.shape == (tokens, 7)
    assert (y_TO - expected_TO).norm() <= 1e-6 * expected_TO.norm()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("asked", [("2:4", None), ("8:16", "16:256")], ids=str)
def test_half_precision(asked: tuple[str, str | None], tokens: int, dtype: torch.dtype) -> None:
    of, weight_OI = quantised_matrix(asked, "int4", {}, *WIDTHS[0])
    x_TI = torch.randn(tokens, of.inputs, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    y_TO = coded_gemv.product(on_device(coded(of)), x_TI, **nm(asked))
    expected_TO = x_TI.double() @ weight_OI.double().T.to(DEVICE)
    assert y_TO.dtype == dtype
    assert (y_TO.double() - expected_TO).norm() <= ROUNDING[dtype] * expected_TO.norm()


def test_what_they_do_not_take_is_refused() -> None:
    of, _ = quantised_matrix(("2:4", None), "int4", {}, 64, 32)
    with pytest.raises(ValueError, match="codes of 4 bits at 2:4 and 17 tokens"):
        coded_gemv.product(on_device(coded(of)), torch.ones(17, 64, device=DEVICE), n=2, m=4)
    of, _ = quantised_matrix(("20:40", None), "int4", {}, 80, None)
    assert not coded_gemv.takes(coded(of), 1, n=20, m=40)
