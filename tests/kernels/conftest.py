"""Triton's interpreter runs the kernels where there is no GPU; it is chosen before a kernel's module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
