"""Times every tile of the packed matrix-vector kernels on a GPU, against cuBLAS and the bytes of the weights.

    TRITON_CACHE_DIR=.triton python experiments/gpu_tune.py --compile 90      # without a GPU: compiles for that capability
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
TOKENS = [1, 4, 16]


def tiles(rows: int, inputs: int, tokens: int, n: int, m: int) -> list[Any]:
    """The candidates of the run-time search, and more."""
    from esparse.kernels.gemv import Tile, candidates

    found = candidates(rows, inputs, tokens, n=n, m=m)
    survivors = ["scan", "gather"] if (n, m) != (2, 4) else ["pairs", "scan", "gather"]
    shapes = ((4, 64, 4), (4, 128, 4), (16, 64, 8), (16, 16, 4), (32, 16, 4), (4, 32, 2), (8, 128, 4))
    splits = (1, 2, 4) if rows <= 4096 else (1, 2)
    more = [Tile(kernel, r, d, w, s) for kernel in survivors for s in splits for r, d, w in shapes]
    if tokens >= 4:
        wide = ((16, 16, 4), (64, 8, 4), (64, 4, 4), (32, 8, 4), (32, 16, 4), (64, 16, 8), (128, 4, 4), (16, 8, 2))
        more += [Tile("expand", r, d, w, s) for s in splits for r, d, w in wide]
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


def compile_all(capability: int) -> None:
    wanted = {((tokens, n, m), tile) for _, r, i, tokens, n, m in cases() for tile in tiles(r, i, tokens, n, m)}
    # One number of tokens for each kernel that is made of it.
    kernels = {(case[1:], min(4, case[0]), tile): (case, tile) for case, tile in sorted(wanted, key=str)}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        ends = [pool.submit(compile_one, capability, *one) for one in kernels.values()]
        failed = [str(error).strip().splitlines()[-1] for end in ends if (error := end.exception())]
    print(f"{len(kernels)} kernels, {len(failed)} refused: {sorted(set(failed))}", file=sys.stderr)


def time_all() -> None:
    import torch
    import triton

    from esparse.bench.products import Case, dense_product, error, pruned, random_input, random_weight, reference
    from esparse.bench.timing import CudaClock, Protocolled, measure, rotation
    from esparse.kernels.form import to_form
    from esparse.kernels.gemv import matvec
    from esparse.patterns import NM

    device = torch.device("cuda")
    clock, how = CudaClock(device), Protocolled(warm_up=1, repeats=5, least_ms=0.5, graph_below_ms=10.0)
    dense = dense_product("bfloat16")
    for name, rows, inputs, tokens, n, m in cases():
        case = Case(tokens, rows, inputs, "bfloat16", NM(n, m))
        weight_RI = pruned(random_weight(rows, inputs, "bfloat16", device), case.nm)
        x_TI = random_input(tokens, inputs, "bfloat16", device)
        expected_TR = reference(weight_RI, x_TI)
        values_RK, bits_RB = to_form(weight_RI, weight_RI != 0)
        turns = rotation(weight_RI.nbytes // 2, clock)
        dense_calls = [partial(dense, w, x_TI) for w in [weight_RI.clone() for _ in range(turns)]]
        packed = [(values_RK.clone(), bits_RB.clone()) for _ in range(turns)]
        about = {"layer": name, "tokens": tokens, "pattern": f"{n}:{m}"}
        ms = measure({"dense": dense_calls}, clock, how)["dense"].ms
        gb = (values_RK.nbytes + bits_RB.nbytes) / 1e9
        print(json.dumps(about | {"tile": "dense", "us": round(1000 * ms, 2)}), flush=True)
        for tile in tiles(rows, inputs, tokens, n, m):
            try:
                off = error(matvec(values_RK, bits_RB, x_TI, n=n, m=m, tile=tile), expected_TR)
                calls = [partial(matvec, v, b, x_TI, n=n, m=m, tile=tile) for v, b in packed]
                own = measure({"tile": calls}, clock, how)["tile"].ms
            except (RuntimeError, triton.runtime.errors.OutOfResources) as why:
                print(json.dumps(about | {"tile": str(tile), "why": str(why)[:200]}), flush=True)
                continue
            row = {"tile": f"{tile.kernel} {tile.rows} {tile.depth} {tile.warps} {tile.split}"}
            row |= {
                "us": round(1000 * own, 2),
                "x": round(ms / own, 3),
                "tb_s": round(gb / own, 3),
                "off": round(off, 5),
            }
            print(json.dumps(about | row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="times ten: 80 for A100, 90 for H100")
    asked = parser.parse_args()
    if asked.compile:
        compile_all(asked.compile)
    else:
        time_all()


if __name__ == "__main__":
    main()
