"""Compiles every Triton kernel for GPUs that are not here, by the very code that would launch it.

    TRITON_INTERPRET=0 python -m tests.kernels.elsewhere 80 90      # compute capabilities, times ten

Prints a JSON line for each: the kernel, what for, and how often each instruction that is of interest stands in its PTX.
The assembler that Triton brings along has taken it by then.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from esparse.kernels import coded_gemv, exchange, tally
from esparse.kernels.decode import decode
from esparse.kernels.gemv import candidates, matvec
from esparse.kernels.norm import norm
from esparse.kernels.repair import sweep_block
from esparse.packed.quantised_layer import coded
from tests.kernels.packed import matrix
from tests.kernels.quantised_matrices import quantised_matrix

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PRODUCTS = [(BF16, 2, 4, 1), (BF16, 2, 4, 4), (F16, 8, 16, 2), (F32, 4, 8, 16), (BF16, 16, 32, 3), (F16, 3, 6, 1)]
# Pattern, grid and its settings, precision of the inputs, tokens.
OF_CODES: list[tuple[tuple[str, str | None], str, dict[str, Any], torch.dtype, int]] = [
    (("2:4", None), "int4", {}, BF16, 1),
    (("2:4", None), "int8", {"symmetric": False}, F16, 4),
    (("8:16", "16:256"), "int3", {}, BF16, 16),
    (("dense", None), "nf4", {}, F32, 1),
    (("2:4", "1:16"), "fp8", {"outlier_bits": None}, BF16, 2),
]
OF_INTEREST = re.compile(r"\b(?:ld\.global|st\.global|mma|wgmma)[\w.]*")


class Elsewhere:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    about: dict[str, Any] = {}

    def compile_only(function: Any, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = function.warmup(*arguments, grid=grid, **options)
            assert compiled.asm["cubin"]
            found = Counter(OF_INTEREST.findall(compiled.asm["ptx"]))
            print(json.dumps(about | {"kernel": function.__name__.strip("_"), "instructions": found}))

        return launch

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    for capability in map(int, sys.argv[1:]):
        driver.set_active(Elsewhere(capability))
        for dtype, n, m, tokens in PRODUCTS:
            inputs = 2048 if m & (m - 1) == 0 else 2046  # rows that are whole numbers of words, and not
            _, values_RK, bits_RB = matrix(n, m, 32, inputs, dtype)
            about = {"for": capability, "dtype": str(dtype), "pattern": f"{n}:{m}", "tokens": tokens}
            x_TI, order_I = torch.ones(tokens, inputs, dtype=dtype), torch.arange(inputs) if tokens > 1 else None
            half = dtype != F32 and inputs % 16 == 0
            ways = [
                candidates(4096, inputs, count, n=n, m=m, in_registers=way)
                for way in sorted({half, False})
                for count in sorted({tokens, 16})
            ]
            first_of_each = {tile.kernel: tile for tiles in ways for tile in reversed(tiles)}
            for tile in first_of_each.values():
                matvec(values_RK, bits_RB, x_TI, n=n, m=m, order_I=order_I, tile=tile)
            if tokens != 4:  # of each pattern once
                decode(values_RK, bits_RB, inputs, n=n, m=m)
        for asked, quantise, changes, dtype, tokens in OF_CODES:
            about = {"for": capability, "dtype": str(dtype), "pattern": asked[0], "tokens": tokens, "codes": quantise}
            of, cut = coded(quantised_matrix(asked, quantise, changes, 2048, 64)[0]), {"n": 1, "m": 1}
            if asked[0] != "dense":
                cut = dict(zip("nm", map(int, asked[0].split(":")), strict=True))
            coded_gemv.product(of, torch.ones(tokens, 2048, dtype=dtype), **cut, tile=coded_gemv.TILES[0])
        for dtype, hidden in ((BF16, 4096), (F32, 20000)):
            about = {"for": capability, "dtype": str(dtype), "hidden": hidden}
            norm(torch.ones(2, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype), 1e-5, torch.arange(hidden))
        for dtype in (BF16, F16, F32):
            about = {"for": capability, "dtype": str(dtype)}
            x_TI, of_channel_I = torch.ones(64, 4096, dtype=dtype), torch.ones(4096)
            tally.squares(x_TI)
            tally.extremes(x_TI)
            tally.count(x_TI, of_channel_I, of_channel_I, torch.zeros(100, 4096, dtype=torch.int32))
        for n, m in ((2, 4), (8, 16), (3, 5)):
            about = {"for": capability, "pattern": f"{n}:{m}"}
            columns_BCR, block_K = torch.ones(2, 240, 512), torch.arange(2)
            _, levels_KRM = exchange.cut(columns_BCR, block_K, torch.arange(2 * m).view(2, m), n=n)
            exchange.summed_maxima(levels_KRM, columns_BCR.mT.contiguous(), block_K, 2)
            for own in (0, m):
                upper_II, keep_OI = torch.ones(4096, 4096), torch.ones(64, 4096, dtype=torch.bool)
                sweep_block(torch.ones(64, 4096), keep_OI, upper_II, 128, 256, own, n, n)


if __name__ == "__main__":
    main()
