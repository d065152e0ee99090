"""Orders made physical: a reordered model computes what it did before, with as few gathers as there can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.reorder import Reordered, apply, reorder
from tests.models.families import FAMILIES, tiny

CPU = torch.device("cpu")
TOKENS_SL = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(5))
HEAD = 8  # channels of a head in all small families
IN_HEADS = ("o_proj", "out_proj", "attn.c_proj", "attention.dense")


def orders_of(block: Block, *, in_heads: bool) -> dict[str, Tensor]:
    """A random order for every input group but experts'; what attention makes stays within its heads, if asked to."""
    matrices = block.matrices()
    with matrices.observed(lambda group, x_TI: None):
        block.activations.observe(block.index)
    generator = torch.Generator().manual_seed(block.index)
    orders: dict[str, Tensor] = {}
    for group in matrices.groups:
        order_I = torch.randperm(group.inputs, generator=generator)
        if in_heads and group.matrices[0].name.endswith(IN_HEADS):
            inside = torch.randperm(HEAD, generator=generator)
            order_I = torch.cat([start + inside for start in range(0, group.inputs, HEAD)])
        orders |= {m.entry: order_I for m in group.matrices if m.expert is None}
    return orders


def reordered(family: str, *, in_heads: bool = True, gathers: bool = True) -> tuple[BlockModel, list[Reordered]]:
    """A model whose blocks are reordered in memory, and how."""
    blocks = BlockModel(tiny(family), device=CPU, batch_tokens=24)
    activations = Activations(blocks, TOKENS_SL)
    plans = []
    for index in range(len(blocks.blocks)):
        block = Block(index, activations, None, (), 0)
        before = {name: value.clone() for name, value in blocks.model.state_dict().items()}
        plans.append(reorder(block, orders_of(block, in_heads=in_heads), gathers=gathers))
        assert all(torch.equal(value, before[name]) for name, value in blocks.model.state_dict().items())
        activations.advance(index)
    for index, plan in enumerate(plans):
        apply(blocks.model, f"{blocks.prefix}.{index}", plan)
    return blocks, plans


def logits(blocks: BlockModel) -> Tensor:
    with torch.no_grad():
        return blocks.model(input_ids=TOKENS_SL, use_cache=False).logits


def short(names: object) -> set[str]:
    return {str(name).removesuffix(".weight").rpartition(".")[2] for name in names}  # type: ignore[attr-defined]


@pytest.mark.parametrize("in_heads", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reordered_model_computes_the_same(family: str, in_heads: bool) -> None:
    expected = logits(BlockModel(tiny(family), device=CPU, batch_tokens=24))
    blocks, plans = reordered(family, in_heads=in_heads)
    torch.testing.assert_close(logits(blocks), expected, rtol=0, atol=1e-5)
    original = tiny(family).state_dict()
    moved = [
        n for n, value in blocks.model.state_dict().items() if n in original and not torch.equal(value, original[n])
    ]
    assert moved and all(plan.columns for plan in plans)


# What makes o_proj's input and down_proj's; behind which norms a gather stands.
@pytest.mark.parametrize(
    ("family", "rows", "behind"),
    [
        ("llama", {"v_proj", "gate_proj", "up_proj"}, {"input_layernorm", "post_attention_layernorm"}),
        ("qwen2", {"v_proj", "gate_proj", "up_proj"}, {"input_layernorm", "post_attention_layernorm"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "fc1"}, {"self_attn_layer_norm", "final_layer_norm"}),
        ("phi3", {"qkv_proj", "gate_up_proj"}, {"input_layernorm", "post_attention_layernorm"}),
        ("gpt2", {"c_attn", "c_fc"}, {"ln_1", "ln_2"}),
    ],
)
def test_what_can_absorb_an_order_does(family: str, rows: set[str], behind: set[str]) -> None:
    _, plans = reordered(family)
    for plan in plans:
        assert short(plan.rows) == rows
        assert short(plan.behind) == behind
        assert not plan.before and not plan.left
        assert plan.absorbed == 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_order_across_heads_is_gathered(family: str) -> None:
    _, plans = reordered(family, in_heads=False)
    for plan in plans:
        assert short(plan.before) == {"o_proj"}
        assert short(plan.rows) == {"gate_proj", "up_proj"}


def test_heads_that_share_keys_and_values_must_be_ordered_alike() -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)  # 4 heads over 2 key/value heads
    activations = Activations(blocks, TOKENS_SL)
    block, swapped = Block(0, activations, None, (), 0), torch.arange(32)
    swapped[:2] = torch.tensor([1, 0])  # in the first head only, whose sibling keeps its order
    name = "model.layers.0.self_attn.o_proj"
    assert set(reorder(block, {f"{name}.weight": swapped}, gathers=True).before) == {name}
    swapped[8:10] = torch.tensor([9, 8])
    plan = reorder(block, {f"{name}.weight": swapped}, gathers=True)
    assert not plan.before and short(plan.rows) == {"v_proj"}


def test_without_gathers_the_rest_is_named() -> None:
    _, plans = reordered("llama", in_heads=False, gathers=False)
    for plan in plans:
        assert short(plan.columns) == {"down_proj"}
        assert short(plan.left) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
        assert not plan.behind and not plan.before


def test_a_norm_that_routers_read_is_not_gathered_behind() -> None:
    _, plans = reordered("qwen2-moe")
    for plan in plans:
        assert short(plan.behind) == {"input_layernorm"}
        assert short(plan.before) == {"gate_proj", "up_proj"}  # of the shared expert


def test_experts_are_named() -> None:
    blocks = BlockModel(tiny("mixtral"), device=CPU, batch_tokens=24)
    orders = {"model.layers.0.mlp.experts.down_proj": torch.stack([torch.randperm(48) for _ in range(4)])}
    plan = reorder(Block(0, Activations(blocks, TOKENS_SL), None, (), 0), orders, gathers=True)
    assert plan.left == list(orders) and not plan.columns


def test_an_order_that_is_none_changes_nothing() -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    orders = {"model.layers.0.self_attn.q_proj.weight": torch.arange(32)}
    plan = reorder(Block(0, Activations(blocks, TOKENS_SL), None, (), 0), orders, gathers=True)
    assert not plan.columns and not plan.behind and not plan.before
