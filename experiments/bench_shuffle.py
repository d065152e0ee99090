"""Claims that shuffling a 4096 x 4096 layer takes seconds on two CPU cores, and keeps what plain greedy search keeps.

    python experiments/bench_shuffle.py
    python experiments/bench_shuffle.py --scores lognormal --rows 4096 --inputs 4096 --pattern 2:4 --block 256 --seed 0

The first table times the shuffles and says how much more of the total score the pattern keeps than in the channels' own
order. The second table compares the local block shuffle with the plain greedy search, which looks at all swaps of a
block, makes the single best one and begins again; it runs on the first `--plain-blocks` blocks only, since the whole
layer would take it ten minutes. The third table adds objective=error to the local block shuffle of `--error-blocks`
layers that are one block wide, on inputs half of whose variance is shared: what a layer of k blocks
takes is k times that. Cost: half a minute for the first table, one for the second, less for the third, on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from esparse.patterns import NM, Grouping, parse
from esparse.shuffles import Layers
from esparse.shuffles.error_swaps import squared_error
from esparse.shuffles.gns import Gns
from esparse.shuffles.lbs import Esparse, Lbs
from esparse.shuffles.score_swaps import TOLERANCE

DRAWS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "uniform": lambda rows, inputs, seeded: torch.rand(rows, inputs, generator=seeded),
    # Weights times the norms of channels, of which a few are large: the shape of Wanda's scores.
    "lognormal": lambda rows, inputs, seeded: (
        torch.randn(rows, inputs, generator=seeded).abs() * torch.randn(inputs, generator=seeded).exp()
    ),
}


def kept(scores_OI: Tensor, order_I: Tensor, pattern: NM) -> float:
    """The total score that the pattern keeps in this order."""
    ordered_OI = scores_OI[:, order_I]
    return ordered_OI.mul_(pattern.keep_top(ordered_OI)).sum(dtype=torch.float64).item()


def correlated(rows: int, width: int, seeded: torch.Generator) -> tuple[Tensor, Layers]:
    """A layer with Wanda's scores, on inputs that share a quarter as many signals as there are channels."""
    shared_TI = torch.randn(4 * width, width // 4, generator=seeded) @ torch.randn(width // 4, width, generator=seeded)
    own_TI = torch.randn(4 * width, width, generator=seeded) * (width // 4) ** 0.5
    x_TI = (shared_TI + own_TI) * torch.randn(width, generator=seeded).exp()
    layers = Layers(torch.randn(rows, width, generator=seeded), x_TI.T @ x_TI)
    return layers.dense_OI.abs() * layers.gram_II.diagonal().sqrt(), layers


def plain_greedy(scores_OI: Tensor, pattern: NM) -> tuple[Tensor, int]:
    """The order after the single best swap, again and again until none gains; and how many swaps that took."""
    values_IO = scores_OI.T.double()
    inputs = len(values_IO)
    group_I = torch.arange(inputs) // pattern.m
    with_II = values_IO.new_empty(inputs, inputs)  # what p's group keeps if q takes the place of p
    changed = range(inputs)
    for swaps in range(10**6):
        for p in changed:
            others = values_IO[(group_I == group_I[p]) & (torch.arange(inputs) != p)]
            top = others.sort(dim=0, descending=True).values
            with_II[p] = top[: pattern.n - 1].sum() + torch.maximum(top[pattern.n - 1], values_IO).sum(dim=1)
        base_I = with_II.diagonal()
        gain_II = with_II + with_II.T - base_I[:, None] - base_I
        gain_II[group_I[:, None] == group_I] = 0
        left, right = divmod(int(gain_II.argmax()), inputs)
        if gain_II[left, right] <= TOLERANCE * (base_I[left] + base_I[right]):
            return group_I.argsort(stable=True), swaps
        group_I[[left, right]] = group_I[[right, left]]
        changed = [p for p in range(inputs) if group_I[p] in group_I[[left, right]]]
    raise AssertionError("the kept score rises with every swap, so the search must end")


def compare_with_plain(scores_OI: Tensor, asked: argparse.Namespace) -> None:
    width = asked.block - asked.block % asked.pattern.m
    print(f"\nThe first {asked.plain_blocks} blocks of the layer, each block a search of its own:")
    heads = f"{'block':>5} {'lbs s':>8} {'plain s':>8} {'swaps':>6} {'lbs':>10} {'plain':>10}"
    print(f"{heads} {'lbs / plain':>12} {'of its gain':>12}")
    for begin in range(0, min(asked.plain_blocks * width, asked.pattern.grouped_inputs(asked.inputs)), width):
        block_OI = scores_OI[:, begin : begin + width]
        none = kept(block_OI, torch.arange(block_OI.shape[1]), asked.pattern)
        start = time.perf_counter()
        ours_I = Lbs(objective="score", block=asked.block).order(block_OI, asked.pattern)
        middle = time.perf_counter()
        plain_I, swaps = plain_greedy(block_OI, asked.pattern)
        end = time.perf_counter()
        assert ours_I is not None
        ours, plain = kept(block_OI, ours_I, asked.pattern), kept(block_OI, plain_I, asked.pattern)
        print(
            f"{begin // width:5} {middle - start:8.2f} {end - middle:8.2f} {swaps:6} {ours / none - 1:+10.4%} "
            f"{plain / none - 1:+10.4%} {ours / plain:12.6f} {(ours - none) / (plain - none):12.2%}",
            flush=True,
        )


def time_error(asked: argparse.Namespace) -> None:
    width = min(asked.block, asked.inputs)
    print(f"\nobjective=error on layers of {asked.rows} x {width}, one block each:")
    print(f"{'layer':>5} {'lbs s':>8} {'error s':>8} {'error beside none: lbs':>23} {'then error':>11}")
    for layer in range(asked.error_blocks):
        seeded = torch.Generator().manual_seed(asked.seed + layer)
        scores_OI, layers = correlated(asked.rows, width, seeded)

        def error(order_I: Tensor, scores_OI: Tensor = scores_OI, layers: Layers = layers) -> float:
            keep_OI = Grouping(asked.pattern, order_I).keep_top(scores_OI)
            return squared_error(layers.dense_OI.masked_fill(keep_OI, 0.0), layers.gram_II)

        seconds, ends = [], []
        for objective in ("score", "error"):
            start = time.perf_counter()
            order_I = Lbs(objective=objective, block=asked.block).order(scores_OI, asked.pattern, layers)
            seconds.append(time.perf_counter() - start)
            assert order_I is not None
            ends.append(error(order_I) / error(torch.arange(width)) - 1)
        print(f"{layer:5} {seconds[0]:8.2f} {seconds[1]:8.2f} {ends[0]:+23.3%} {ends[1]:+11.3%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the shuffles and compares their kept score with plain greedy.")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--pattern", type=parse, default="2:4")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", choices=DRAWS, default="uniform")
    parser.add_argument("--plain-blocks", type=int, default=2, help="blocks that the plain greedy search sees; 0: none")
    parser.add_argument("--error-blocks", type=int, default=1, help="layers of one block for objective=error; 0: none")
    asked = parser.parse_args()
    if not isinstance(asked.pattern, NM):
        parser.error("only a pattern n:m has groups to shuffle")
    scores_OI = DRAWS[asked.scores](asked.rows, asked.inputs, torch.Generator().manual_seed(asked.seed))
    own_I = torch.arange(asked.inputs)
    print(
        f"{asked.rows} x {asked.inputs} {asked.scores} scores, seed {asked.seed}, {asked.pattern}, "
        f"blocks of {asked.block}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )

    print(f"\n{'shuffle':19} {'seconds':>9} {'kept score':>11}")
    none = kept(scores_OI, own_I, asked.pattern)
    print(f"{'none':19} {0:9.2f} {0:+11.4%}")
    for name, shuffle in {
        "gns, straight": Gns(deal="straight"),
        "gns, serpentine": Gns(deal="serpentine"),
        "lbs": Lbs(objective="score", block=asked.block),
        "esparse, straight": Esparse(objective="score", deal="straight", block=asked.block),
        "esparse, serpentine": Esparse(objective="score", deal="serpentine", block=asked.block),
    }.items():
        start = time.perf_counter()
        order_I = shuffle.order(scores_OI, asked.pattern)
        seconds = time.perf_counter() - start
        assert order_I is not None
        print(f"{name:19} {seconds:9.2f} {kept(scores_OI, order_I, asked.pattern) / none - 1:+11.4%}", flush=True)

    if asked.plain_blocks:
        compare_with_plain(scores_OI, asked)
    if asked.error_blocks:
        time_error(asked)


if __name__ == "__main__":
    main()
