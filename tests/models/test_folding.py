"""Which channels may change places without a gather; compared with what the families are known to compute."""

from __future__ import annotations

import pytest
import torch

from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.folding import foldable_runs
from esparse.models.reorder import reorder
from tests.models.families import tiny

TOKENS_SL = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(5))


def block_of(family: str) -> Block:
    blocks = BlockModel(tiny(family), device=torch.device("cpu"), batch_tokens=24)
    return Block(0, Activations(blocks, TOKENS_SL), None, (), 0)


# By family: what reads the MLP's inner channels, what reads the heads; None where no order is absorbed.
@pytest.mark.parametrize(
    ("family", "of_values", "down", "heads"),
    [
        ("llama", 2, "mlp.down_proj", "self_attn.o_proj"),
        ("qwen2", 2, "mlp.down_proj", "self_attn.o_proj"),
        ("opt", 4, "fc2", "self_attn.out_proj"),
        ("phi3", 2, "mlp.down_proj", "self_attn.o_proj"),
        ("bloom", 4, "mlp.dense_4h_to_h", "self_attention.dense"),
        ("gpt-neox", 4, "mlp.dense_4h_to_h", "attention.dense"),
        ("gpt2", 4, "mlp.c_proj", "attn.c_proj"),
    ],
)
def test_the_mlp_is_free_and_heads_are_free_within(family: str, of_values: int, down: str, heads: str) -> None:
    block = block_of(family)
    before = {name: value.clone() for name, value in block.module.state_dict().items()}
    found = foldable_runs(block)
    assert set(found) == {f"{block.name}.{name}.weight" for name in (down, heads)}
    of_queries = block.activations.blocks.model.config.num_attention_heads
    inner, within = found[f"{block.name}.{down}.weight"], found[f"{block.name}.{heads}.weight"]
    assert inner.shape[:2] == (1, 1)
    assert within.shape == (of_values, of_queries // of_values, within.shape[2])
    assert torch.equal(within.flatten(), torch.arange(within.numel()))  # each channel once
    assert all(torch.equal(value, before[name]) for name, value in block.module.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_every_order_that_is_named_is_absorbed(family: str) -> None:
    block = block_of(family)
    for seed in range(3):
        seeded, orders = torch.Generator().manual_seed(seed), {}
        for entry, runs_BRD in foldable_runs(block).items():
            order_I = torch.empty(runs_BRD.numel(), dtype=torch.int64)
            for runs_RD in runs_BRD:
                order_I[runs_RD] = runs_RD[:, torch.randperm(runs_RD.shape[1], generator=seeded)]
            orders[entry] = order_I
        plan = reorder(block, orders, gathers=False)
        assert plan.absorbed == len(orders) == 2 and not plan.left


def test_experts_keep_their_order() -> None:
    assert not any("experts" in entry for entry in foldable_runs(block_of("mixtral")))
