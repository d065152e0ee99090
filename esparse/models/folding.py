"""Which orders of a tensor's channels a block can absorb: a shuffle that chooses among these alone needs no gather.

The channels of down_proj may come in any order, as gate and up can make them in it. Those of o_proj may change places
within their head, with all heads that share a value head alike. What a norm makes stays as it is. All of this is found
by trying (models/reorder.py), for every family alike.

Shapes: I channels of a tensor, B sets of channels that are ordered on their own, R runs that take one order together,
D channels of a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esparse.models.block import Block
from esparse.models.graph import BlockGraph
from esparse.models.matrices import InputGroup
from esparse.models.model_parts import shared_matrices
from esparse.models.reorder import absorbs


def foldable_runs(block: Block) -> dict[str, Tensor]:
    """For each weight whose input can be reordered for free: its channels as B x R x D; a copy of an order per run.

    The block is on the device, and stays as it is. Weights that are not named must keep their channels' own order;
    experts are among them, and all of a block that shares some with another one, where the order would apply too.
    """
    shared = shared_matrices(block.activations.blocks.by_name())
    if any(name.startswith(f"{block.name}.") for pair in shared.items() for name in pair):
        return {}
    graph = BlockGraph(block)
    graph.watch(lambda group, x_TI: None)
    found: dict[str, Tensor] = {}
    for group in graph.matrices.groups:
        runs_BRD = None if group.matrices[0].expert is not None else _runs(graph, group, block)
        if runs_BRD is not None:
            found |= {matrix.entry: runs_BRD for matrix in group.matrices}
    return found


def _runs(graph: BlockGraph, group: InputGroup, block: Block) -> Tensor | None:
    for runs_BRD in _candidates(group.inputs, block):
        if absorbs(graph, group, _any_order(runs_BRD)):
            return runs_BRD
    return None


def _candidates(inputs: int, block: Block) -> list[Tensor]:
    """The freest first: all channels at once, then head by head, with one to all query heads on a value head."""
    all_I = torch.arange(inputs)
    config = block.activations.blocks.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    candidates = [all_I.view(1, 1, inputs)]
    if heads > 1 and inputs % heads == 0:
        shared = [getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")]
        for of_values in dict.fromkeys([heads, *(n for n in shared if n and heads % n == 0), 1]):
            candidates.append(all_I.view(of_values, heads // of_values, inputs // heads))
    return candidates


def _any_order(runs_BRD: Tensor) -> Tensor:
    """An order that these sets allow, drawn at random: what absorbs it absorbs all of them."""
    generator = torch.Generator().manual_seed(0)
    order_I = torch.empty(runs_BRD.numel(), dtype=torch.int64)
    for runs_RD in runs_BRD:
        order_I[runs_RD] = runs_RD[:, torch.randperm(runs_RD.shape[1], generator=generator)]
    return order_I
