"""Matrix products from packed n:m weights, and inner loops of pruning: Triton on a GPU, numba or PyTorch on a CPU.

The compute form of a matrix of R rows (outputs) and I columns (inputs): `values` (R x K), the K kept weights of
each row in column order; `bits` (R x ceil(I / 8), uint8), bit i of byte j stands for column 8j + i, 1 = kept.

Pruning's inner loops exist in plain PyTorch, as loops that numba compiles for a CPU (maxima.py, histogram.py,
columns.py) and as Triton kernels for a GPU (exchange.py, tally.py, repair.py).
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OLDEST = (8, 0)  # compute capability of the GPUs that the kernels are compiled for in the tests

log = logging.getLogger("esparse")


@cache
def loops(name: str) -> Any:
    """The module of numba loops esparse/kernels/NAME.py; None without numba (installed by the extra `cpu`).

    If numba is installed but fails (wrong NumPy version, no folder for its cache), logs a warning and returns None.
    """
    if find_spec("numba") is None:
        return None
    try:
        return import_module(f"{__name__}.{name}")
    except Exception as error:  # of many types
        log.warning(
            "numba is installed and does not work here (%s: %s): the CPU computes without compiled loops, more slowly",
            type(error).__name__,
            str(error).partition("\n")[0],
        )
        return None


def triton(name: str, device: torch.device) -> Any:
    """The module of Triton kernels esparse/kernels/NAME.py; None if the device cannot run them."""
    return _triton(name, device) if device.type == "cuda" else None


@cache
def _triton(name: str, device: torch.device) -> Any:
    import torch

    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < OLDEST:
        return None
    return import_module(f"{__name__}.{name}")
