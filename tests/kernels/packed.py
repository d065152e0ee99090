"""Packed matrices to try kernels on, and where: on the GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esparse.kernels.form import to_form
from esparse.patterns import NM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU these are tests of the compiled kernels.
ON_GPU_TOO = [pytest.mark.gpu] if DEVICE == "cuda" else []


def matrix(
    n: int, m: int, rows: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The dense matrix with zeros, and its values and bits."""
    seeded = torch.Generator().manual_seed(seed)
    weight_RI = torch.randn(rows, inputs, generator=seeded).to(dtype)
    keep_RI = NM(n, m).keep_top(torch.rand(rows, inputs, generator=seeded))
    values_RK, bits_RB = to_form(weight_RI, keep_RI)
    dense_RI = torch.where(keep_RI, weight_RI, torch.zeros((), dtype=dtype))
    return dense_RI.to(DEVICE), values_RK.to(DEVICE), bits_RB.to(DEVICE)
