"""Makes the GPU of a tensor the current one, on which Triton launches its kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def on_its_gpu(function: Callable[P, T]) -> Callable[P, T]:
    """The function, during whose calls the GPU of its first tensor is the current one; nothing changes for a CPU.

    PyTorch's operations run where their tensors are. Triton launches on the current GPU: without this, kernels for a
    model on cuda:1, or on several GPUs, would run on cuda:0, which cannot read their tensors.
    """

    @wraps(function)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            return function(*args, **kwargs)

    return there
