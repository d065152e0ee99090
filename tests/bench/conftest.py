"""Triton's interpreter stands in where there is no GPU."""

from tests.kernels import conftest as _interpreter  # noqa: F401
