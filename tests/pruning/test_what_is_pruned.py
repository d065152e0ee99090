"""What of a block is pruned: every expert however it is stored and multiplied, no router; and what stays dense."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import esparse
from esparse.metrics.wanda import Wanda
from esparse.models.blocks import BlockModel
from esparse.models.matrices import BlockMatrices
from esparse.models.store import MemoryStore
from esparse.patterns import NM
from esparse.pruning.journal import Journal
from esparse.pruning.method import Method
from esparse.pruning.prune import Pruned, prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from tests.models.families import SMALL, tiny
from tests.models.test_forward_check import families

CPU = torch.device("cpu")
TOKENS_SL = torch.randint(1, 96, (8, 24), generator=torch.Generator().manual_seed(3))
METHOD = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle())


def pruned(model: Any, tokens_SL: Tensor = TOKENS_SL, **more: Any) -> Pruned:
    blocks = BlockModel(model, device=CPU, batch_tokens=96, store=more.pop("store", None))
    return prune(blocks, tokens_SL, METHOD, stages=Stages(), **more)


def zeros(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


def holds(weight_OI: Tensor) -> bool:
    return bool(((weight_OI != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all())


def test_experts_in_two_dimensions() -> None:
    model = families.build("dbrx")
    result = pruned(model)
    experts = model.transformer.blocks[1].ffn.experts.mlp
    for name, transposed in (("w1", False), ("v1", False), ("w2", True)):
        weight_EOI = getattr(experts, name).data.unflatten(0, (4, -1))
        assert holds(weight_EOI.mT if transposed else weight_EOI), name
        entry = f"transformer.blocks.1.ffn.experts.mlp.{name}"
        assert result.keeps[entry].shape == ((4, 32, 48) if transposed else (4, 48, 32))
    assert zeros(model.transformer.blocks[1].ffn.router.layer.weight) == 0


@pytest.mark.parametrize("family", ["llama4_text", "inkling_text"])
def test_experts_that_are_multiplied_at_once(family: str) -> None:
    model = families.build(family)
    result = pruned(model)
    stacks = [name for name in result.keeps if "experts" in name]
    assert stacks
    for name in stacks:
        assert zeros(model.get_parameter(name)) == 0.5, name


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts_of_a_model_that_was_not_loaded_for_it(implementation: str) -> None:
    """All implementations prune the same, and the model is left with its own."""
    model = tiny("mixtral")
    model.set_experts_implementation(implementation)
    result = pruned(model)
    assert model.config._experts_implementation == implementation
    expected = tiny("mixtral")
    keeps = pruned(expected).keeps
    assert set(result.keeps) == set(keeps)
    assert all(torch.equal(result.keeps[name], keeps[name]) for name in keeps)
    assert zeros(model.model.layers[0].mlp.experts.gate_up_proj) == 0.5


class Experts(nn.Module):
    """Two experts in one parameter, multiplied in one of the ways that people write."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 8, 16, generator=generator))
        self.experts = nn.Module()
        self.experts.flat = nn.Parameter(torch.randn(2 * 16, 8, generator=generator))

    def forward(self, x_TI: Tensor) -> Tensor:
        x_ETI = torch.stack([x_TI, 2 * x_TI])
        if self.way == "einsum":
            return torch.einsum("eti,eio->eto", x_ETI, self.weight)
        if self.way == "matmul":
            return x_ETI @ self.weight
        if self.way == "on the left":
            return (self.weight.mT @ x_ETI.mT).mT
        if self.way == "linear":
            return torch.stack([nn.functional.linear(x, w) for x, w in zip(x_ETI, self.weight.mT, strict=True)])
        if self.way == "halves":
            return torch.stack(
                [torch.cat([x @ w[:, :8], x @ w[:, 8:]], -1) for x, w in zip(x_ETI, self.weight, strict=True)]
            )
        if self.way == "grouped":
            ends = torch.tensor([len(x_TI), 2 * len(x_TI)], dtype=torch.int32)
            return torch._grouped_mm(x_ETI.flatten(0, 1), self.weight, offs=ends)
        return torch.stack([x @ w.T for x, w in zip(x_ETI, self.experts.flat.view(2, 16, 8), strict=True)])


@pytest.mark.parametrize("way", ["einsum", "matmul", "on the left", "linear", "halves", "flat"])
def test_an_expert_is_seen_whatever_multiplies_it(way: str) -> None:
    experts = Experts(way)
    matrices = BlockMatrices(experts, "block")
    x_TI = torch.randn(5, 8)
    seen: dict[str, Tensor] = {}
    with matrices.observed(lambda group, x_TI: seen.update({group.matrices[0].name: x_TI})), torch.no_grad():
        experts(x_TI)
    assert len(seen) == 2, seen.keys()
    for place, (name, x) in enumerate(sorted(seen.items())):
        assert name.endswith(f"[{place}]")
        torch.testing.assert_close(x, (1 + place) * x_TI)
    for group in matrices.groups:
        assert group.matrices[0].view().shape == (16, 8)


def test_all_experts_in_one_grouped_product_are_seen() -> None:
    experts = Experts("grouped").bfloat16()
    matrices = BlockMatrices(experts, "block")
    x_TI = torch.randn(16, 8).bfloat16()
    seen: list[Tensor] = []
    with matrices.observed(lambda group, x_TI: seen.append(x_TI)), torch.no_grad():
        experts(x_TI)
    assert [matrix.name for group in matrices.groups for matrix in group.matrices] == [
        "block[0]",
        "block[1]",
    ]
    torch.testing.assert_close(torch.stack(seen), torch.stack([x_TI, 2 * x_TI]))


class Listed(nn.Module):
    """Takes the place of an MLP: experts that are modules of a list, of which no token ever reaches the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x[..., :1] > 0
        return torch.where(first, self.experts[0](x), self.experts[1](x))


def test_an_expert_of_a_list_that_no_token_reached_is_pruned_as_its_siblings() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = Listed()
    result = pruned(model)
    assert result.share_of_blocks == 1
    assert zeros(model.model.layers[1].mlp.experts[2][1].weight) == 0.5


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        ("hunyuan_v1_moe", {"mlp.gate.wg"}),
        ("gemma3n_text", {"altup.modality_router", "altup.prediction_coefs", "altup.correction_coefs"}),
        ("jetmoe", {"mlp.router.layer", "self_attention.experts.router.layer"}),
        ("qwen2_moe", {"mlp.gate", "mlp.shared_expert_gate"}),
        ("llama4_text", {"feed_forward.router"}),
    ],
)
def test_routers_stay_as_they_are(family: str, dense: set[str]) -> None:
    model = families.build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = pruned(model)
    left = {name.removesuffix(".weight").split(".", 3)[3] for name in result.left_dense}
    assert left == dense
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in result.left_dense)


class Mixed(nn.Module):
    """Takes the place of an MLP: `choose` decides by top-k, `gate` and `open` only scale."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(32, 4, bias=False)
        self.open = nn.Linear(32, 4, bias=False)
        self.gate = nn.Linear(32, 32, bias=False)
        self.parts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.choose(x).float().sigmoid().view(-1, 4)
        best, which = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, which, best).view(*x.shape[:-1], 4)
        y = sum(weights[..., i, None] * part(x) for i, part in enumerate(self.parts))
        return y * self.gate(x).sigmoid() * self.open(x).sigmoid().mean(-1, keepdim=True)


def test_a_router_is_what_chooses_whatever_it_is_called_and_gates_that_scale_are_pruned() -> None:
    model = tiny("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Mixed()
    result = pruned(model)
    assert set(result.left_dense) == {f"model.layers.{i}.mlp.choose.weight" for i in range(3)}
    assert zeros(model.model.layers[0].mlp.gate.weight) == 0.5
    assert zeros(model.model.layers[0].mlp.open.weight) == 0.5


def test_attention_whose_heads_have_as_many_channels_as_there_are_tokens_has_no_router() -> None:
    """Its scores, of which softmax is taken, are then as many as its queries."""
    config = LlamaConfig(**SMALL | {"head_dim": TOKENS_SL.shape[1]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert pruned(model).left_dense == {}


class Reads(nn.Module):
    """Takes the place of an MLP whose layers do not all read one tensor once; each way a family might write."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.one, self.two = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "the first one twice":
            y = self.one(x) + self.one(x.flip(-1).exp()) + self.two(x)
        elif self.way == "the second one twice":
            y = self.two(x) + self.one(x) + self.one(x.flip(-1).exp())
        elif self.way == "written to in between":
            x = x.clone()
            y = self.one(x)
            y = y + self.two(x.exp_())
        elif self.way == "one vector":
            y = self.one(x) + self.two(x.new_ones(32))
        elif self.way == "in inference mode":
            with torch.inference_mode():
                y = self.one(x) + self.two(x.exp())
            y = y.clone()
        else:
            y = self.one(input=x) + self.two(input=x.exp())
        return self.down(y.sigmoid())


@pytest.mark.tries(6)
@pytest.mark.parametrize(
    "way",
    [
        "the first one twice",
        "the second one twice",
        "written to in between",
        "one vector",
        "in inference mode",
        "by keyword",
    ],
)
def test_a_layer_is_scored_by_all_that_it_reads_and_nothing_else(way: str) -> None:
    """The oracle: the layers' inputs as their products see them."""
    model = tiny("llama")
    torch.manual_seed(0)
    model.model.layers[0].mlp = mlp = Reads(way)
    square: dict[nn.Module, Tensor] = {}

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        (x,) = (*args, *kwargs.values())
        square[layer] = square.get(layer, 0) + x.reshape(-1, x.shape[-1]).square().sum(0)

    layers = (mlp.one, mlp.two, mlp.down)
    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        for part in TOKENS_SL.split(4):  # the micro-batches of `pruned`
            model(input_ids=part, use_cache=False)
    for hook in hooks:
        hook.remove()
    score = {layer: layer.weight.data.abs() * square[layer].sqrt() for layer in layers}
    dense = copy.deepcopy(model)
    esparse.prune(model, None, "2:4", metric="wanda", shuffle=None, calibration=TOKENS_SL, batch_tokens=96)
    for layer in layers:
        assert torch.equal(layer.weight != 0, NM(2, 4).keep_top(score[layer]))
    # A metric whose inputs are looked at twice.
    assert esparse.prune(dense, None, "2:4", metric="entropy", calibration=TOKENS_SL, batch_tokens=96).pattern_holds


def test_few_pruned_weights_are_a_warning_that_names_the_largest(caplog: pytest.LogCaptureFixture) -> None:
    model = families.build("mllama")
    with caplog.at_level(logging.WARNING, logger="esparse"):
        result = pruned(model)
    assert result.share_of_blocks == pytest.approx(0.75, abs=0.01)
    (warning,) = [r.getMessage() for r in caplog.records if "of the blocks'" in r.getMessage()]
    assert warning.startswith("only 75.0 % of the blocks'")
    assert next(iter(result.left_dense)) in warning


@pytest.mark.tries(1)
@pytest.mark.parametrize("snapshot_seconds", [0.0, None])
@pytest.mark.parametrize("family", ["gemma4_text", "glm_moe_dsa", "gpt2"])
def test_a_run_goes_on_where_it_was(family: str, snapshot_seconds: float | None, tmp_path: Path) -> None:
    """Also with blocks that share state, and with weights that lie transposed (GPT-2's), as their masks then do."""

    class Killed(BaseException):
        pass

    def kill(index: int, layer: Any) -> None:
        if index == 3:
            raise Killed

    def opened() -> Journal:
        return Journal.open(tmp_path / "blocks", {"id": "one"}, snapshot_seconds=snapshot_seconds)

    expected = pruned(families.build(family))
    with pytest.raises(Killed), opened() as journal:
        pruned(families.build(family), store=MemoryStore(journal.folder), on_layer=kill, journal=journal)
    with opened() as journal:
        assert journal.finished == 3
        assert journal.snapshot_before() == (0 if snapshot_seconds is None else 3)
        model = families.build(family)
        result = pruned(model, store=MemoryStore(journal.folder), journal=journal)
    assert set(result.keeps) == set(expected.keeps)
    assert all(torch.equal(result.keeps[name], expected.keeps[name]) for name in expected.keeps)
