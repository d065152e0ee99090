"""Every family of the README: pruned as a whole, and nothing else touched; the loop computes what the model does."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from esparse.metrics.wanda import Wanda
from esparse.models.activations import Activations
from esparse.models.blocks import BlockModel
from esparse.models.calls import Recorder
from esparse.patterns import NM
from esparse.pruning.prune import Method, prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from esparse.updates import NoUpdate
from tests.models.families import FAMILIES, tiny

# 2-D parameters inside a block that are no layers to prune: routers and their like.
ROUTERS = (".gate.weight", ".router.weight", ".shared_expert_gate.weight")


def tokens(sequences: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(1, 96, (sequences, length), generator=torch.Generator().manual_seed(3))


def cut(model: torch.nn.Module, batch_tokens: int = 48) -> BlockModel:
    return BlockModel(model, device=torch.device("cpu"), batch_tokens=batch_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_computes_what_the_model_computes(family: str) -> None:
    model, ids = tiny(family), tokens()
    with torch.inference_mode():
        expected = model(ids, use_cache=False, output_hidden_states=True)
    blocks = cut(model)
    activations = Activations(blocks, ids)
    for index in range(len(blocks.blocks)):
        torch.testing.assert_close(torch.cat(activations.hidden), expected.hidden_states[index], rtol=0, atol=1e-5)
        activations.advance(index)
    heads = zip(blocks.micro_batches(ids), activations.hidden, strict=True)
    logits = torch.cat([blocks.logits(ids_BL, hidden) for ids_BL, hidden in heads])
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_the_blocks_is_pruned_and_nothing_else(family: str) -> None:
    model = tiny(family)
    blocks = cut(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), update=NoUpdate())
    pruned = prune(blocks, tokens(), method, stages=Stages())

    expected = {
        name
        for name, value in before.items()
        if name.startswith(f"{blocks.prefix}.")
        and value.ndim >= 2
        and not name.endswith(ROUTERS)
        and not name.endswith("_bias")
    }
    assert set(pruned.keeps) == expected
    assert pruned.pattern_holds
    after = model.state_dict()
    for name, dense in before.items():
        if name not in expected:
            assert torch.equal(after[name], dense), f"{name} was changed"
            continue
        # Conv1D (GPT-2) and GPT-OSS's experts store inputs x outputs.
        stored_by_inputs = family == "gpt2" or (family == "gpt-oss" and dense.ndim == 3)
        kept = after[name].transpose(-1, -2) if stored_by_inputs else after[name]
        original = dense.transpose(-1, -2) if stored_by_inputs else dense
        assert ((kept != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all(), f"{name} is not 2:4"
        assert torch.equal(kept, original * pruned.keeps[name]), f"{name}: survivors changed"
        assert not torch.signbit(kept[kept == 0]).any(), f"{name} holds -0.0"


def test_a_cache_is_never_replayed() -> None:
    cache = DynamicCache()
    named = {"past_key_values": cache, "layer_past": None, "other": cache, "use_cache": True}
    recorder = Recorder()
    recorder.calls.append((0, torch.empty(0), None, (cache, 1), named))
    recorded, _ = recorder.templates()
    assert recorded[0].args == (None, 1)
    assert recorded[0].kwargs == {"past_key_values": None, "layer_past": None, "other": None, "use_cache": False}


@pytest.mark.parametrize(
    ("family", "together"),
    [
        ("llama", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        ("llama", {"mlp.gate_proj", "mlp.up_proj"}),
        ("falcon", {"self_attention.query_key_value", "mlp.dense_h_to_4h"}),
        ("qwen2-moe", {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}),
        ("mixtral", {"mlp.experts.gate_up_proj[2]"}),
    ],
)
def test_layers_that_read_one_tensor_form_one_group(family: str, together: set[str]) -> None:
    from esparse.models.matrices import BlockMatrices

    blocks = cut(tiny(family))
    activations = Activations(blocks, tokens())
    matrices = BlockMatrices(blocks.blocks[0], "block")
    with matrices.observed(lambda group, x_TI: None):
        activations.observe(0)
    groups = [{m.name.removeprefix("block.") for m in group.matrices} for group in matrices.groups]
    assert together in groups
    assert sum(map(len, groups)) == len(set().union(*groups)), "a matrix stands in two groups"
