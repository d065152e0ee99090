"""Times every tile of the packed matrix-vector kernels on a GPU, against cuBLAS and the bytes of the weights.

    TRITON_CACHE_DIR=.triton python experiments/gpu_tune.py --compile 90      # for that capability, without a GPU
    TRITON_CACHE_DIR=.triton python experiments/gpu_tune.py                   # on the GPU: a JSON line for each tile

What `matvec` looks for at run time among its candidates is looked for here among more of them. Times are those of
CUDA graphs that go through copies of the weights, so that none of them is still in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {"o_proj": (4096, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
PATTERNS = [(2, 4), (8, 16)]
TOKENS = [1, 2, 4, 16, 64]


def tiles(rows: int, inputs: int, tokens: int, n: int, m: int) -> list[Any]:
    """The candidates of the run-time search, and more."""
    from esparse.kernels.gemv import Tile, candidates

    found = candidates(rows, inputs, tokens, n=n, m=m, in_registers=True)
    few = ((1, 128, 4), (4, 16, 2), (8, 32, 4), (16, 16, 8), (2, 128, 8)) if tokens <= 4 and n == 2 else ()
    many = ((64, 8, 8), (32, 16, 4), (16, 16, 4), (16, 16, 1), (128, 8, 8))
    splits = (1, 2, 4) if rows <= 4096 else (1, 2)
    more = [Tile("select", r, d, w, s) for s in splits for r, d, w in few]
    more += [Tile("spread", r, d, w, s) for s in splits for r, d, w in many]
    return list(dict.fromkeys([*found, *more]))


def cases() -> Iterator[tuple[str, int, int, int, int, int]]:
    for n, m in PATTERNS:
        for tokens in TOKENS:
            for name, (rows, inputs) in SHAPES.items():
                yield name, rows, inputs, tokens, n, m


def compile_one(capability: int, case: tuple[int, int, int], tile: Any) -> None:
    """Compiles one tile, as the launch would."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from esparse.kernels.form import to_form
    from esparse.kernels.gemv import matvec
    from esparse.patterns import NM
    from tests.kernels.elsewhere import Elsewhere

    def compile_only(function: Any, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: function.warmup(*arguments, grid=grid, **options) and None

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    driver.set_active(Elsewhere(capability))
    tokens, n, m = case
    weight_RI = torch.randn(16, 4096).to(torch.bfloat16)
    values_RK, bits_RB = to_form(weight_RI, NM(n, m).keep_top(weight_RI.float()))
    matvec(values_RK, bits_RB, torch.ones(tokens, 4096, dtype=torch.bfloat16), n=n, m=m, tile=tile)


def compile_all(capability: int, *, few: bool) -> None:
    from esparse.kernels.gemv import candidates

    def of(rows: int, inputs: int, tokens: int, n: int, m: int) -> list[Any]:
        return (
            candidates(rows, inputs, tokens, n=n, m=m, in_registers=True) if few else tiles(rows, inputs, tokens, n, m)
        )

    wanted = {((tokens, n, m), tile) for _, r, i, tokens, n, m in cases() for tile in of(r, i, tokens, n, m)}
    kernels = {(case, tile): (case, tile) for case, tile in sorted(wanted, key=str)}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        ends = [pool.submit(compile_one, capability, *one) for one in kernels.values()]
        failed = [str(error).strip().splitlines()[-1] for end in ends if (error := end.exception())]
    print(f"{len(kernels)} kernels, {len(failed)} refused: {sorted(set(failed))}", file=sys.stderr)


def time_all() -> None:
    import torch
    import triton

    from esparse.bench.products import Case, dense_product, error, pruned, random_input, random_weight, reference
    from esparse.bench.timing import CudaClock, rotation
    from esparse.kernels.form import to_form
    from esparse.kernels.gemv import matvec
    from esparse.patterns import NM

    device = torch.device("cuda")
    clock = CudaClock(device)
    dense = dense_product("bfloat16")

    def microseconds(calls: list[Callable[[], object]]) -> float:
        """Of one call, the least of three times ten replays of a graph that goes through all copies."""

        def through() -> None:
            for call in calls:
                call()

        through()
        replay = clock.graphed(through)
        assert replay is not None
        replay()
        times = [clock.milliseconds(lambda: [replay() for _ in range(10)]) for _ in range(3)]
        return 1000 * min(times) / 10 / len(calls)

    for name, rows, inputs, tokens, n, m in cases():
        case = Case(tokens, rows, inputs, "bfloat16", NM(n, m))
        weight_RI = pruned(random_weight(rows, inputs, "bfloat16", device), case.nm)
        x_TI = random_input(tokens, inputs, "bfloat16", device)
        expected_TR = reference(weight_RI, x_TI)
        values_RK, bits_RB = to_form(weight_RI, weight_RI != 0)
        turns = rotation(weight_RI.nbytes // 2, clock)
        packed = [(values_RK.clone(), bits_RB.clone()) for _ in range(turns)]
        about = {"layer": name, "tokens": tokens, "pattern": f"{n}:{m}"}
        own = microseconds([partial(dense, w, x_TI) for w in [weight_RI.clone() for _ in range(turns)]])
        mb = (values_RK.nbytes + bits_RB.nbytes) / 1e6
        print(json.dumps(about | {"tile": "dense", "us": round(own, 2)}), flush=True)
        for tile in tiles(rows, inputs, tokens, n, m):
            named = f"{tile.kernel} {tile.rows} {tile.depth} {tile.warps} {tile.split}"
            try:
                off = error(matvec(values_RK, bits_RB, x_TI, n=n, m=m, tile=tile), expected_TR)
                us = microseconds([partial(matvec, v, b, x_TI, n=n, m=m, tile=tile) for v, b in packed])
            except (RuntimeError, triton.runtime.errors.OutOfResources) as why:
                print(json.dumps(about | {"tile": named, "why": str(why)[:200]}), flush=True)
                continue
            row = {"tile": named, "us": round(us, 2), "x": round(own / us, 3)}
            print(json.dumps(about | row | {"tb_s": round(mb / us, 3), "off": round(off, 5)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="times ten: 80 for A100, 90 for H100")
    parser.add_argument("--few", action="store_true", help="compile only what is looked for at run time")
    asked = parser.parse_args()
    if asked.compile:
        compile_all(asked.compile, few=asked.few)
    else:
        time_all()


if __name__ == "__main__":
    main()
