"""Triton launches on the current GPU, which must be the one of the tensors: models are on cuda:1, or on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.packed import matrix
from tests.kernels.quantised_matrices import quantised_matrix

pytest.importorskip("triton")

from esparse.kernels import coded_gemv, exchange, norm, repair, tally
from esparse.kernels.decode import decode
from esparse.kernels.gemv import Tile, matvec
from esparse.packed.quantised_layer import coded


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Tensor] = []
    launched = set()

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def noted(kernel: Any, grid: Any) -> Callable[..., None]:
        assert current, f"{kernel.__name__} is launched on whatever GPU is the current one"
        return lambda *_, **__: launched.add(kernel.__name__.strip("_"))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(type(norm._norm_kernel), "__getitem__", noted)
    _, values_RK, bits_RB = matrix(2, 4, 8, 64, torch.float16)
    x_TI = torch.ones(2, 64, dtype=torch.float16, device=values_RK.device)
    for name in ("gather", "expand", "select", "spread"):
        matvec(values_RK, bits_RB, x_TI, n=2, m=4, tile=Tile(name, 8, 2, 4, 2))
    decode(values_RK, bits_RB, 64, n=2, m=4)
    of = coded(quantised_matrix(("8:16", "16:256"), "int4", {}, 256, 8)[0])
    coded_gemv.product(of, torch.ones(2, 256), n=8, m=16, tile=coded_gemv.TILES[0])
    norm.norm(torch.ones(2, 64), torch.ones(64), 1e-5)
    tally.squares(torch.ones(2, 64))
    tally.count(torch.ones(2, 64), torch.ones(64), torch.ones(64), torch.zeros(4, 64, dtype=torch.int32))
    exchange.cut(torch.ones(1, 8, 4), torch.zeros(2).long(), torch.arange(8).view(2, 4), n=2)
    exchange.summed_maxima(torch.ones(2, 4, 4), torch.ones(1, 4, 8), torch.zeros(2).long(), 2)
    repair.sweep_block(torch.ones(8, 64), torch.ones(8, 64).bool(), torch.ones(64, 64), 0, 16, 4, 2, 2)
    kinds = ("gather", "expand", "select", "spread", "fold", "decode", "coded", "outliers", "norm", "reduce", "count")
    assert launched == {f"{kind}_kernel" for kind in (*kinds, "cut", "maxima", "repair")}
