"""The shapes of published models' pruned matrices, from the tables in their papers.

LLaMA: Touvron et al. 2023 (arXiv 2302.13971), table 2; its gated MLP has 2/3 of 4 times the width, rounded up to
multiples of 256. OPT: Zhang et al. 2022 (arXiv 2205.01068), table 1; its MLP is four times as wide.
"""

from __future__ import annotations

from esparse.bench import LayerShape


def _llama(hidden: int, inner: int) -> list[LayerShape]:
    return [
        LayerShape("self_attn.q_proj", hidden, hidden, 4),
        LayerShape("mlp.gate_proj", inner, hidden, 2),
        LayerShape("mlp.down_proj", hidden, inner, 1),
    ]


def _opt(hidden: int) -> list[LayerShape]:
    return [
        LayerShape("self_attn.q_proj", hidden, hidden, 4),
        LayerShape("fc1", 4 * hidden, hidden, 1),
        LayerShape("fc2", hidden, 4 * hidden, 1),
    ]


# One block of each model; `matrices` counts the block's matrices of a shape.
NAMED = {
    "llama-7b": _llama(4096, 11008),
    "llama-13b": _llama(5120, 13824),
    "llama-30b": _llama(6656, 17920),
    "llama-65b": _llama(8192, 22016),
    "opt-6.7b": _opt(4096),
    "opt-30b": _opt(7168),
}
