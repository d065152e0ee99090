"""The compute forms of an n:m matrix, of values and of codes, and conversions in plain PyTorch.

Shapes: R or O rows (outputs), I columns (inputs), K kept weights of a row, B bytes of a row's bits or codes, G groups
of a row that share a scale, S outliers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Units:
    """A row cut into runs of `columns` columns with `kept` kept weights each; a shorter last run has fewer.

    A run holds whole groups of n:m, so that the k-th kept weight of run u is value u * kept + k of its row.
    """

    columns: int
    kept: int


class Coded(NamedTuple):
    """A quantised matrix as loops and kernels take it; columns are in group order."""

    inputs: int
    kept: int  # weights of a row that have a code
    code_bits: int
    codes_OB: Tensor  # of each row a stream of codes, filled to a byte
    keep_OB: Tensor | None  # the keep bits; None if all weights are kept
    scale_OG: Tensor  # float16, bfloat16 or float32
    zero_OG: Tensor | None  # the code of zero of each group (uint8)
    zero: int  # the code of zero, if all groups have the same
    levels_256: Tensor | None  # by code (float32); None if the level of a code is code - zero
    outlier_values_OS: Tensor | None = None  # of outliers in 16 bits
    outlier_codes_OS: Tensor | None = None  # of other outliers (uint8)
    outlier_places_OS: Tensor | None = None
    outlier_starts_S: Tensor | None = None  # the column that each place counts from


def units(n: int, m: int) -> Units | None:
    """How kernels cut rows of n:m into runs; None if no run of at most 32 columns has at most 16 kept weights.

    Runs with eight kept weights are preferred: at 16 bits each, they are one 16-byte load.
    """
    cuts = [Units(c, c * n // m) for c in (16, 32, m) if c % m == 0 and c <= 32 and c * n // m <= 16]
    return max(cuts, key=lambda u: (u.columns in (16, 32), u.kept == 8, u.kept), default=None)


def in_registers(dtype: torch.dtype, inputs: int, n: int, m: int) -> bool:
    """Whether rows are whole runs of 16 columns with 8 kept weights of two bytes each (kernels/registers.py)."""
    return dtype in (torch.float16, torch.bfloat16) and 2 * n == m and 16 % m == 0 and inputs % 16 == 0


def in_place(values_RK: Tensor, bits_RB: Tensor) -> bool:
    """Whether values and bits lie in memory as the kernels of registers.py load them: 16 bytes at a time."""
    return bits_RB.is_contiguous() and values_RK.is_contiguous() and values_RK.data_ptr() % 16 == 0


def kept_per_row(inputs: int, n: int, m: int) -> int:
    """K, the kept weights of a row: n of each whole group, ceil(r * n / m) of a last group of r columns."""
    groups, tail = divmod(inputs, m)
    return groups * n - (-tail * n // m)


def to_form(weight_RI: Tensor, keep_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The compute form (values_RK, bits_RB) of a matrix and its keep mask (True = kept).

    Raises ValueError if the rows do not all keep the same number of weights.
    """
    counts_R = keep_RI.sum(1)
    if len(counts_R) and not (counts_R == counts_R[0]).all():
        least, most = int(counts_R.min()), int(counts_R.max())
        raise ValueError(f"every row must keep as many weights for the compute form, got {least} to {most}")
    rows, bits_RB = len(weight_RI), packed_bits(keep_RI)
    values_RK = weight_RI[keep_RI].view(rows, -1)
    return values_RK.masked_fill(values_RK == 0, 0.0), bits_RB  # no -0.0: kernels of others compress it wrongly


def packed_bits(keep_RI: Tensor) -> Tensor:
    """A boolean matrix as bytes (R x B), the lowest bit first, each row filled to a byte."""
    if keep_RI.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep_RI.numpy(), axis=-1, bitorder="little"))
    rows, inputs = keep_RI.shape
    padded = torch.nn.functional.pad(keep_RI, (0, -inputs % 8)).view(rows, -1, 8)
    powers = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=keep_RI.device)
    return (padded * powers).sum(-1, dtype=torch.uint8)


def unpacked_bits(bits_RB: Tensor, inputs: int) -> Tensor:
    """The boolean matrix (R x inputs) that `packed_bits` was given; True = survives."""
    if bits_RB.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits_RB.numpy(), axis=-1, count=inputs, bitorder="little").view(bool))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits_RB.device)
    return ((bits_RB[..., None] >> shifts) & 1).bool().flatten(-2)[..., :inputs]


def to_dense(values_RK: Tensor, bits_RB: Tensor, inputs: int) -> Tensor:
    """The dense matrix (R x inputs), with zeros for pruned weights."""
    dense_RI = values_RK.new_zeros(values_RK.shape[0], inputs)
    return dense_RI.masked_scatter_(unpacked_bits(bits_RB, inputs), values_RK)
