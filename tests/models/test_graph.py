"""What makes what is found in every family, and nothing that does not make it; a change that shows is taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.graph import BlockGraph
from esparse.models.matrices import InputGroup, Matrix
from esparse.models.producers import Edge, Producer
from tests.models.families import FAMILIES, tiny

# What nothing can absorb a scale for: GELU lies between, and in gpt-oss 1 is added to what `up` returns.
NOT_LINKED = {
    "opt-post-norm": {f"self_attn.{name}_proj" for name in "qkv"},
    "bloom": {"mlp.dense_4h_to_h"},
    "gpt-neox": {"mlp.dense_4h_to_h"},
    "falcon": {"mlp.dense_4h_to_h"},
    "falcon-alibi": {"mlp.dense_4h_to_h"},
    "falcon-new": {"mlp.dense_4h_to_h"},
    "gpt2": {"mlp.c_proj"},
    "gpt-oss": {f"mlp.experts.down_proj[{e}]" for e in range(4)},
}
MADE_BY = {
    "llama": {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.down_proj": "mlp.up_proj",
    },
    "qwen3": {"self_attn.o_proj": "self_attn.v_proj", "mlp.up_proj": "post_attention_layernorm"},
    "gemma2": {"mlp.gate_proj": "pre_feedforward_layernorm", "mlp.down_proj": "mlp.up_proj"},
    "phi3": {"self_attn.o_proj": "self_attn.qkv_proj", "mlp.down_proj": "mlp.gate_up_proj"},
    "opt": {"fc1": "final_layer_norm", "fc2": "fc1", "self_attn.out_proj": "self_attn.v_proj"},
    "bloom": {"self_attention.dense": "self_attention.query_key_value"},
    "gpt-neox": {"attention.dense": "attention.query_key_value", "mlp.dense_h_to_4h": "post_attention_layernorm"},
    "falcon": {"self_attention.dense": "self_attention.query_key_value", "mlp.dense_h_to_4h": "input_layernorm"},
    "falcon-new": {"mlp.dense_h_to_4h": "ln_mlp", "self_attention.query_key_value": "ln_attn"},
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "attn.c_attn"},
    "mixtral": {f"mlp.experts.down_proj[{e}]": f"mlp.experts.gate_up_proj[{e}]" for e in range(4)}
    | {f"mlp.experts.gate_up_proj[{e}]": "post_attention_layernorm" for e in range(4)},
    "qwen2-moe": {"mlp.shared_expert.down_proj": "mlp.shared_expert.up_proj"}
    | {f"mlp.experts.gate_up_proj[{e}]": "post_attention_layernorm" for e in range(4)},
    "gpt-oss": {f"mlp.experts.gate_up_proj[{e}]": "post_attention_layernorm" for e in range(4)},
}


def tokens(sequences: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(1, 96, (sequences, length), generator=torch.Generator().manual_seed(3))


def block_of(model: PreTrainedModel, ids: torch.Tensor | None = None, skip: tuple[str, ...] = ()) -> Block:
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=32)
    return Block(0, Activations(blocks, tokens() if ids is None else ids), None, skip, 0)


def watched(block: Block) -> BlockGraph:
    graph = BlockGraph(block)
    graph.watch(lambda group, x_TI: None)
    return graph


def short(block: Block, name: str) -> str:
    return name.removeprefix(f"{block.name}.")


def reading(graph: BlockGraph, name: str) -> InputGroup:
    return next(g for g in graph.matrices.groups if any(m.name.endswith(name) for m in g.matrices))


def matrix(graph: BlockGraph, name: str) -> Matrix:
    return next(m for g in graph.matrices.groups for m in g.matrices if m.name.endswith(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_producers_are_found_and_looking_changes_nothing(family: str) -> None:
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    block = block_of(model)
    edges, unmatched = watched(block).edges()
    assert {short(block, m.name) for g in unmatched for m in g.matrices} == NOT_LINKED.get(family, set())
    made_by = {
        short(block, m.name): short(block, edge.producer.name)
        for together in edges
        for edge in together
        for g in edge.groups
        for m in g.matrices
    }
    known = MADE_BY.get(family, {})
    assert {name: made_by[name] for name in known} == known
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rows_of_grouped_queries() -> None:
    graph = watched(block_of(tiny("llama")))  # heads of 8 channels, four of q on two of v
    producer = graph.producer(reading(graph, "o_proj"))
    assert producer is not None
    assert producer.row_of_I.tolist() == [(c // 8 // 2) * 8 + c % 8 for c in range(32)]


def test_rows_of_heads_that_are_fused_one_by_one() -> None:
    graph = watched(block_of(tiny("bloom")))
    producer = graph.producer(reading(graph, "self_attention.dense"))
    assert producer is not None
    # Every head has 8 rows of q, 8 of k, 8 of v.
    assert producer.row_of_I.tolist() == [(c // 8) * 24 + 16 + c % 8 for c in range(32)]


def test_rows_of_fused_query_key_value() -> None:
    graph = watched(block_of(tiny("phi3")))
    producer = graph.producer(reading(graph, "o_proj"))
    assert producer is not None
    assert producer.row_of_I.tolist() == [32 + 16 + (c // 8 // 2) * 8 + c % 8 for c in range(32)]
    producer = graph.producer(reading(graph, "down_proj"))
    assert producer is not None
    assert producer.row_of_I.tolist() == list(range(48, 96))


@pytest.mark.parametrize(
    ("family", "wrong", "reader", "row_of_I"),
    [
        ("llama", "gate_proj", "down_proj", list(range(48))),
        ("llama", "q_proj", "o_proj", list(range(32))),
        ("llama", "k_proj", "o_proj", [(c // 8 // 2) * 8 + c % 8 for c in range(32)]),
        ("llama", "v_proj", "o_proj", [c % 16 for c in range(32)]),  # the right rows, dealt out wrongly
        ("phi3", "gate_up_proj", "down_proj", list(range(48))),
        ("gpt2", "c_fc", "mlp.c_proj", list(range(128))),
    ],
)
def test_what_does_not_make_a_tensor_is_rejected(family: str, wrong: str, reader: str, row_of_I: list[int]) -> None:
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = watched(block_of(model))
    group = reading(graph, reader)
    producer = Producer.of_matrix(matrix(graph, wrong), torch.tensor(row_of_I))
    assert not graph.makes(producer, group, graph.tensor(None, group))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gemma_multiplies_by_one_plus_weight_and_llama_does_not() -> None:
    for family, offset in (("llama", 0.0), ("gemma2", 1.0), ("gemma3", 1.0)):
        graph = watched(block_of(tiny(family)))
        producer = graph.producer(reading(graph, "up_proj"))
        assert producer is not None
        assert producer.parts[0][1] == offset


def doubled(edge: Edge) -> None:
    edge.move(torch.full((edge.groups[0].inputs,), 2.0))


def test_a_change_that_somebody_else_reads_is_taken_back() -> None:
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) + x
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = watched(block_of(model))
    edges, unmatched = graph.edges()
    assert unmatched == []
    done = {together[0].producer.name: graph.changed(together, doubled) for together in edges}
    assert {name.rpartition("layers.0.")[2]: kept for name, kept in done.items()} == {
        "input_layernorm": True,
        "self_attn.v_proj": True,
        "post_attention_layernorm": False,
        "mlp.up_proj": True,
    }
    after = model.state_dict()
    assert torch.equal(
        after["model.layers.0.post_attention_layernorm.weight"],
        before["model.layers.0.post_attention_layernorm.weight"],
    )
    assert torch.equal(after["model.layers.0.mlp.gate_proj.weight"], before["model.layers.0.mlp.gate_proj.weight"])


@pytest.mark.parametrize(("family", "routers"), [("mixtral", 1), ("qwen2-moe", 2), ("gpt-oss", 1)])
def test_routers_read_the_norm_too(family: str, routers: int) -> None:
    model = tiny(family)
    graph = watched(block_of(model))
    edge = next(together[0] for together in graph.edges()[0] if together[0].routers)
    assert len(edge.routers) == routers
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not graph.changed([Edge(edge.producer, edge.groups, [])], doubled)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert graph.changed([edge], doubled)


class Gate(nn.Module):
    """A router of one output, which is not a linear layer; made for these tests."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.T).sigmoid()


class Gated(nn.Module):
    """An MLP times what a gate says of its input."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.gate = mlp, Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) * self.gate(x)


def test_a_norm_that_a_router_reads_beside_one_group_is_nobodys_own() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp = Gated(model.model.layers[0].mlp)
    graph = watched(block_of(model))
    norm = graph.source(reading(graph, "up_proj"))
    assert norm is not None and norm.endswith("post_attention_layernorm")
    assert graph.norm_before(reading(graph, "q_proj")) is not None
    assert graph.norm_before(reading(graph, "up_proj")) is None


def test_layers_that_never_ran_forbid_a_change_of_what_they_may_read() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.unused = nn.Linear(32, 7)
    edges, unmatched = watched(block_of(model)).edges()
    assert {m.name.rpartition(".")[2] for g in unmatched for m in g.matrices} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    }
    assert len(edges) == 2


def test_a_norm_that_layers_that_never_ran_may_read_is_nobodys_own() -> None:
    model = tiny("llama")
    for unused in (False, True):
        if unused:
            model.model.layers[0].mlp.unused = nn.Linear(32, 7)
        graph = watched(block_of(model))
        alone = [graph.norm_before(group) for group in graph.matrices.groups]
        assert [found is not None for found in alone] == [not unused, False, not unused, False]


def test_skipped_layers_belong_to_a_link() -> None:
    block = block_of(tiny("llama"), skip=("k_proj",))
    edges, _ = watched(block).edges()
    assert {m.name.rpartition(".")[2] for m in edges[-1][0].groups[0].matrices} == {"q_proj", "k_proj", "v_proj"}


class Expert(nn.Module):
    """One expert that is a module of its own; made for these tests."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x).relu())


class Experts(nn.Module):
    """Sends every other token to one of two experts, as remote code with lists of modules does."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert(), Expert()])

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        flat, out = x.flatten(0, -2), torch.zeros_like(x.flatten(0, -2))
        for e, expert in enumerate(self.experts):
            out[e::2] = expert(flat[torch.arange(e, len(flat), 2)])
        return out.view_as(x)


def test_experts_that_are_modules_read_rows_of_the_norm() -> None:
    model = tiny("llama")
    torch.manual_seed(0)
    model.model.layers[0].mlp = Experts()
    block = block_of(model)
    graph = watched(block)
    edges, unmatched = graph.edges()
    assert unmatched == []
    found = {short(block, t[0].producer.name): [short(block, g.matrices[0].name) for g in t[0].groups] for t in edges}
    assert found["post_attention_layernorm"] == ["mlp.experts.0.w1", "mlp.experts.1.w1"]
    assert found["mlp.experts.1.w1"] == ["mlp.experts.1.w2"]
    assert all(graph.changed(together, doubled) for together in edges)


class Rarely(nn.Module):
    """An expert beside the MLP for the few tokens whose channel exceeds a limit; made for these tests."""

    def __init__(self, mlp: nn.Module, channel: int, limit: float) -> None:
        super().__init__()
        self.mlp, self.rare, self.channel, self.limit = mlp, Expert(), channel, limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, chosen = self.mlp(x), x[..., self.channel] > self.limit
        if chosen.any():
            out[chosen] += self.rare(x[chosen])
        return out


def test_an_expert_is_tried_on_tokens_that_reach_it() -> None:
    model = tiny("llama")
    layer = model.model.layers[0]
    greatest: list[torch.Tensor] = []
    norm = layer.post_attention_layernorm
    hook = norm.register_forward_hook(lambda _, args, out: greatest.append(out.flatten(0, 1).amax(dim=0)))
    with torch.no_grad():
        for ids in tokens().split(2):
            model(ids, use_cache=False)
    hook.remove()
    before_I, after_I = greatest
    channel = int((after_I - before_I).argmax())
    assert after_I[channel] > before_I[channel]
    torch.manual_seed(0)
    layer.mlp = Rarely(layer.mlp, channel, float(before_I[channel]))
    block = block_of(model)
    assert len(block.activations.hidden) == 2
    edges, unmatched = watched(block).edges()
    assert unmatched == []
    assert "mlp.rare.w1" in {short(block, together[0].producer.name) for together in edges}


def shuffled_columns(block: Block, *names: str) -> None:
    for name in names:
        weight_OI = block.module.get_parameter(f"{name}.weight").data
        order_I = torch.randperm(weight_OI.shape[1], generator=torch.Generator().manual_seed(4))
        weight_OI.copy_(weight_OI[:, order_I])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("massive", [0.0, 1000.0])
def test_a_wrong_block_is_told_from_rounding_in_every_precision(massive: float, dtype: torch.dtype) -> None:
    """What a block adds is small beside the stream, all the more beside one massive activation (attention sinks)."""
    model = tiny("llama").to(dtype)
    ids = tokens()
    ids[:, 0] = 1
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
        model.model.embed_tokens.weight[1, 3] = massive
    block = block_of(model, ids)
    graph = watched(block)
    before = {name: value.clone() for name, value in block.module.state_dict().items()}
    assert graph.same()
    for names in (["mlp.down_proj"], ["self_attn.o_proj"]):
        shuffled_columns(block, *names)
        assert not graph.same(), names
        block.module.load_state_dict(before)
    assert graph.same()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3", "gpt2", "mixtral"])
def test_in_half_precision_a_right_change_passes_and_a_wrong_one_does_not(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    graph = watched(block_of(model))
    for together in graph.edges()[0]:
        before = [stored.clone() for stored in together[0].stored()]

        def odd(edge: Edge) -> None:  # no power of two: weights are rounded
            edge.move(torch.full((edge.groups[0].inputs,), 1.37))

        def half_of_it(edge: Edge) -> None:
            factor_I = torch.rand(edge.groups[0].inputs, generator=torch.Generator().manual_seed(0)) + 0.5
            edge.producer.scale(edge.producer.tied(factor_I))

        assert graph.changed(together, odd)
        for value, stored in zip(before, together[0].stored(), strict=True):
            stored.copy_(value)
        if together[0].producer.matrix is None or together[0].producer.matrix.expert is None:
            assert not graph.changed(together, half_of_it)
        for value, stored in zip(before, together[0].stored(), strict=True):
            stored.copy_(value)
