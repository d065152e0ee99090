"""Equalised models compute what they did before, and their weights have the sizes that the formula asks for."""

from __future__ import annotations

import logging
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse.metrics import Metric
from esparse.metrics.magnitude import Magnitude
from esparse.metrics.wanda import Wanda
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.graph import BlockGraph
from esparse.models.matrices import InputGroup
from esparse.patterns import NM
from esparse.prepare import NoPreparation, Prepare
from esparse.prepare.equalise import Equalise, scale_I
from esparse.pruning.prune import Method, Pruned, prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from tests.models.families import FAMILIES, tiny
from tests.models.test_graph import NOT_LINKED

IDS = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(3))
OTHERS = torch.randint(1, 96, (3, 24), generator=torch.Generator().manual_seed(4))


def cut(model: torch.nn.Module) -> BlockModel:
    return BlockModel(model, device=torch.device("cpu"), batch_tokens=24)


def equalised(
    model: torch.nn.Module,
    ids: torch.Tensor = IDS,
    power: float = 0.5,
    skip: tuple[str, ...] = (),
    blocks: int | None = None,
) -> None:
    cut_up = cut(model)
    activations = Activations(cut_up, ids)
    for index in range(len(cut_up.blocks) if blocks is None else blocks):
        Equalise(power=power).block(Block(index, activations, None, skip, 0))
        activations.advance(index)


def logits(model: torch.nn.Module, ids: torch.Tensor = OTHERS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def first_block(model: torch.nn.Module) -> tuple[BlockGraph, dict[str, torch.Tensor]]:
    """The first block's wiring, and max|X_j| of every layer's input by its name."""
    graph = BlockGraph(Block(0, Activations(cut(model), IDS), None, (), 0))
    largest: dict[InputGroup, torch.Tensor] = defaultdict(lambda: torch.zeros(1))

    def read(group: InputGroup, x_TI: torch.Tensor) -> None:
        if len(x_TI):
            largest[group] = torch.maximum(largest[group], x_TI.abs().amax(dim=0))

    graph.watch(read)
    return graph, {m.name: value for group, value in largest.items() for m in group.matrices}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_the_same(family: str) -> None:
    model = tiny(family)
    before, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    equalised(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
    assert len(changed) >= 3 * 4  # norms, and what they make, in every block


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_weights_are_of_one_size_at_power_a_half(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family)
    equalised(model, blocks=1)
    refused = set(caplog.messages[0].partition(": ")[2].split(", ")) if caplog.messages else set()
    graph, largest = first_block(model)
    compared = 0
    for together in graph.edges()[0]:
        for edge in together:
            matrices = [m for group in edge.groups for m in group.matrices]
            if not any(m.name in largest for m in matrices) or refused & {m.name for m in matrices}:
                continue  # an expert that no token reached; a norm that something else reads as well
            x_I = torch.stack([largest[m.name] for m in matrices if m.name in largest]).amax(dim=0)
            w_I = torch.cat([m.view().abs() for m in matrices]).amax(dim=0)
            x_I, w_I = edge.producer.tied(x_I), edge.producer.tied(w_I)
            used_I = x_I > 0
            assert used_I.sum() > 10
            torch.testing.assert_close(x_I[used_I], w_I[used_I], rtol=1e-4, atol=0)
            compared += 1
    assert not refused or family in NOT_LINKED
    assert compared >= (2 if family in ("falcon", "opt-post-norm") else 3)  # whose one norm serves attention and MLP


def by_the_formula(x: list[list[float]], weights: list[list[list[float]]], power: float) -> list[float]:
    scales = []
    for j in range(len(x[0])):
        largest_input, largest_weight = 0.0, 0.0
        for token in x:
            largest_input = max(largest_input, abs(token[j]))
        for matrix in weights:
            for row in matrix:
                largest_weight = max(largest_weight, abs(row[j]))
        scales.append(largest_input**power / largest_weight ** (1 - power))
    return scales


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_the_scales_of_one_layer_equal_the_formula(power: float) -> None:
    model = tiny("llama")
    mlp, norm = model.model.layers[0].mlp, model.model.layers[0].post_attention_layernorm
    inputs: list[list[float]] = []
    hook = mlp.gate_proj.register_forward_pre_hook(lambda _, args: inputs.extend(args[0].flatten(0, 1).tolist()))
    logits(model, IDS)
    hook.remove()
    gate, norm_before = mlp.gate_proj.weight.detach().clone(), norm.weight.detach().clone()
    # What down_proj's scale does to up_proj's rows comes first: give up_proj the greatest weights of no column.
    mlp.up_proj.weight.data *= 1e-3
    scales = torch.tensor(by_the_formula(inputs, [gate.tolist()], power))
    equalised(model, power=power, blocks=1)
    assert float((scales - 1).abs().max()) > 0.1
    torch.testing.assert_close(mlp.gate_proj.weight.detach(), gate * scales, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(norm.weight.detach(), norm_before / scales, rtol=1e-4, atol=1e-7)


def test_query_heads_that_share_a_value_head_share_their_scales() -> None:
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    o, v = attention.o_proj.weight.detach().clone(), attention.v_proj.weight.detach().clone()
    inputs: list[list[float]] = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: inputs.extend(args[0].flatten(0, 1).tolist()))
    logits(model, IDS)
    hook.remove()
    equalised(model, blocks=1)
    x = torch.tensor(inputs).abs()
    row_scales = []
    for row in range(16):  # heads of 8; query heads 0 and 1 read value head 0, 2 and 3 read 1
        channels = [row // 8 * 16 + row % 8, row // 8 * 16 + 8 + row % 8]
        row_scales.append(float(x[:, channels].max() / o[:, channels].abs().max()) ** 0.5)
        torch.testing.assert_close(attention.o_proj.weight.detach()[:, channels], o[:, channels] * row_scales[row])
    # The columns of v_proj were then scaled as well, each as a whole.
    columns = attention.v_proj.weight.detach() / (v / torch.tensor(row_scales)[:, None])
    torch.testing.assert_close(columns, columns[:1].expand_as(columns))


@given(
    x=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    w=st.floats(1e-3, 1e3),
    power=st.floats(0, 1),
)
def test_a_scale_divides_what_it_multiplies(x: list[float], w: float, power: float) -> None:
    x_I, w_I = torch.tensor(x), torch.full((len(x),), w)
    scale = scale_I(x_I, w_I, power)
    expected = [a**power / w ** (1 - power) for a in x]
    torch.testing.assert_close(scale, torch.tensor(expected).clamp(1e-3, 1e3), rtol=1e-4, atol=0)


def test_unused_channels_stay_and_no_scale_leaves_its_range() -> None:
    got = scale_I(torch.tensor([0.0, 2.0, 0.0, 1e30, 1e-30]), torch.tensor([2.0, 0.0, 0.0, 1.0, 1.0]), 0.5)
    assert got.tolist() == pytest.approx([1.0, 1.0, 1.0, 1e3, 1e-3])


def test_zero_columns_and_dead_channels_stay_as_they_are() -> None:
    model = tiny("opt")  # ReLU: fc1's row 5 never answers, and nobody listens to row 7
    layer = model.model.decoder.layers[0]
    layer.fc1.weight.data[5], layer.fc1.bias.data[5] = 0.0, -1.0
    layer.fc2.weight.data[:, 7] = 0.0
    before = logits(model)
    column, row = layer.fc2.weight.detach()[:, 5].clone(), layer.fc1.bias.detach()[[5, 7]].clone()
    equalised(model)
    assert torch.equal(layer.fc2.weight[:, 5], column)
    assert torch.equal(layer.fc1.bias[[5, 7]], row)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_experts_that_saw_no_token_still_compute_the_same(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    graph = BlockGraph(Block(0, Activations(cut(model), IDS[:1, :1]), None, (), 0))
    graph.watch(lambda group, x_TI: None)
    assert len(graph.matrices.groups) > len(graph._busiest)  # at least one expert is idle
    assert graph.edges()[1] == []  # and is found with its siblings
    equalised(model, ids=IDS[:1, :1])
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))


def pruned_by(metric: Metric, prepare: Prepare) -> Pruned:
    method = Method(metric=metric, pattern=NM(2, 4), shuffle=NoShuffle(), prepare=prepare)
    return prune(cut(tiny("llama")), IDS, method, stages=Stages())


def test_wandas_masks_stay_and_magnitudes_change() -> None:
    for metric, stays in ((Wanda(), True), (Magnitude(), False)):
        plain, prepared = (pruned_by(metric, prepare) for prepare in (NoPreparation(), Equalise(power=0.5)))
        assert prepared.pattern_holds
        differ = {name: float((keep != prepared.keeps[name]).float().mean()) for name, keep in plain.keeps.items()}
        # |w| s * |x| / s: only scores that rounding makes equal could change places.
        assert all((share < 1e-3) if stays else (share > 0.01) for share in differ.values()), differ


def test_skipped_layers_do_not_choose_the_scale_but_follow_it() -> None:
    model = tiny("llama")
    model.model.layers[0].self_attn.k_proj.weight.data *= 100  # would choose every scale of its group
    before = logits(model)
    equalised(model, skip=("k_proj",))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))
    _, largest = first_block(model)
    attention = model.model.layers[0].self_attn
    w_I = torch.cat([attention.q_proj.weight, attention.v_proj.weight]).detach().abs().amax(dim=0)
    torch.testing.assert_close(largest["model.layers.0.self_attn.q_proj"], w_I, rtol=1e-4, atol=0)


def test_a_block_that_is_skipped_stays_as_it_is() -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    equalised(model, skip=("proj",))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family).to(dtype)
    before = logits(model, IDS)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="esparse"):
        equalised(model)
    after = model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(value.dtype == weights[name].dtype for name, value in after.items())
    assert sum(not torch.equal(value, weights[name]) for name, value in after.items()) >= 3 * 4
    assert float((logits(model, IDS) - before).norm() / before.norm()) < 0.05
    if family != "mixtral":  # whose routers may decide otherwise once their weights were rounded
        assert "not equalised" not in caplog.text


def test_what_cannot_be_equalised_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("gpt2")
    before = model.transformer.h[1].mlp.c_proj.weight.detach().clone()
    with caplog.at_level(logging.WARNING, logger="esparse"):
        equalised(model)
    said = [record.getMessage() for record in caplog.records if record.name == "esparse"]  # transformers warns as well
    assert said == [
        f"not equalised, since nothing before them can absorb it: transformer.h.{i}.mlp.c_proj" for i in range(3)
    ]
    assert torch.equal(model.transformer.h[1].mlp.c_proj.weight, before)


def test_what_somebody_else_reads_is_named_too(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    mlp = model.model.layers[2].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) + x
    with caplog.at_level(logging.WARNING, logger="esparse"):
        equalised(model)
    [message] = caplog.messages
    assert message.endswith(": model.layers.2.mlp.gate_proj, model.layers.2.mlp.up_proj")


def test_a_power_outside_its_range_is_refused() -> None:
    for power in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"prepare.power must lie between 0 and 1, got {power}"):
            Equalise(power=power)
