"""Models with rotated heads compute what they did before, and their values lie in principal axes."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esparse.metrics.wanda import Wanda
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.patterns import NM
from esparse.prepare import NoPreparation, Prepare
from esparse.prepare.equalise import Equalise
from esparse.prepare.rotate import RotateHeads, axes_ss, shared_heads, spread
from esparse.pruning.prune import Method, prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from tests.models.families import FAMILIES, MORE, tiny
from tests.prepare.test_equalise import IDS, OTHERS, cut, logits

# Their values pass a norm, or come of other tensors than one matrix's rows, in every block.
NONE = {"qwen3-next", "qwen3.5", "gemma3n", "gemma4"}
SOME = {"olmo-hybrid", "granite-hybrid", "lfm2"}  # have one block of attention


def prepared(model: nn.Module, how: Prepare | None = None, skip: tuple[str, ...] = ()) -> None:
    cut_up = cut(model)
    activations = Activations(cut_up, IDS)
    for index in range(len(cut_up.blocks)):
        (how or RotateHeads()).block(Block(index, activations, None, skip, 0))
        activations.advance(index)


def read_by(layer: nn.Module, model: nn.Module) -> torch.Tensor:
    """What a layer reads of IDS, tokens x inputs."""
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).detach()))
    logits(model, IDS)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_the_model_computes_the_same(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family)
    before, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="esparse"):
        prepared(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    blocks = len(cut(model).blocks)
    named = sum("no heads rotated in" in message for message in caplog.messages)
    rotated = 0 if family in NONE else 1 if family in SOME else blocks
    assert named == blocks - rotated
    assert sum(name.endswith("weight") for name in changed) == 2 * rotated  # what makes the values, what reads them
    assert not any(word in name for name in changed for word in ("mlp", "gate", "norm", "experts", "q_proj", "k_proj"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2", "opt"])
def test_values_of_a_head_are_uncorrelated_and_spread(family: str) -> None:
    model = tiny(family)
    names = [n for n, _ in model.named_modules() if n.endswith(("o_proj", "out_proj", "attn.c_proj"))]
    assert len(names) == 3
    prepared(model)
    for name in names:
        x_TI = read_by(model.get_submodule(name), model).double()
        shared = 1 if family in ("gpt2", "opt") else 2  # query heads of a value head
        x = x_TI.view(len(x_TI), -1, shared, 8)
        gram = torch.einsum("thgs,thgu->hsu", x, x)
        energies = gram.diagonal(dim1=1, dim2=2)
        assert float((gram - torch.diag_embed(energies)).abs().max()) < 1e-4 * float(energies.max())
        # Ranks by decreasing energy: 0, 4, 2, 6 then 1, 5, 3, 7, which is 0 ... 7 by their bits read backwards.
        order = energies.argsort(dim=1, descending=True).argsort(dim=1)
        assert order.tolist() == [[0, 4, 2, 6, 1, 5, 3, 7]] * len(order)


def test_a_head_by_hand() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # eigenvalues 3 and 1, along (1, 1) and (1, -1)
    root = 0.5**0.5
    torch.testing.assert_close(axes_ss(gram)[:, 0], torch.tensor([root, root]).double())
    torch.testing.assert_close(axes_ss(gram)[:, 1].abs(), torch.tensor([root, root]).double())
    assert spread(4) == [0, 2, 1, 3]
    assert spread(6) == [0, 4, 2, 1, 5, 3]


def test_heads_that_share_rows() -> None:
    assert shared_heads(torch.tensor([0, 1, 2, 3]), 2) == [[0], [1]]
    assert shared_heads(torch.tensor([4, 5, 4, 5, 6, 7, 6, 7]), 2) == [[0, 1], [2, 3]]
    assert shared_heads(torch.tensor([4, 5, 4, 5]), 4) == []  # a head cannot have a row twice
    assert shared_heads(torch.tensor([0, 1, 1, 2]), 2) == []
    assert shared_heads(torch.arange(6), 4) == []


@given(size=st.integers(1, 200))
def test_every_group_has_axes_of_the_whole_range(size: int) -> None:
    order = spread(size)
    assert sorted(order) == list(range(size))
    for m in (2, 4, 8):
        if size % m == 0 and size.bit_count() == 1:
            for start in range(0, size, m):
                assert sorted(rank * m // size for rank in order[start : start + m]) == list(range(m))


@given(seed=st.integers(0, 50), size=st.sampled_from([2, 8, 12]))
def test_axes_are_orthonormal_and_diagonalise(seed: int, size: int) -> None:
    x = torch.randn(size // 2 + seed % 20, size, generator=torch.Generator().manual_seed(seed))  # singular, too
    gram, axes = x.T @ x, axes_ss(x.T @ x)
    torch.testing.assert_close(axes.T @ axes, torch.eye(size).double(), rtol=0, atol=1e-9)
    turned = axes.T @ gram.double() @ axes
    assert float((turned - turned.diagonal().diag()).abs().max()) < 1e-9 * float(gram.abs().max())
    assert torch.equal(axes, axes_ss(gram))


@pytest.mark.parametrize("how", [RotateHeads(), Equalise(power=0.5)])
def test_values_that_later_blocks_read_stay(how: Prepare) -> None:
    model = tiny("gemma4")  # the last two blocks read the values of the first two
    for layer in model.model.layers:
        layer.self_attn.v_norm = nn.Identity()  # so that v_proj's rows are the values
    before = logits(model)
    prepared(model, how)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))


@pytest.mark.parametrize("how", [RotateHeads(), Equalise(power=0.5)], ids=["rotate", "equalise"])
@pytest.mark.parametrize("shared", ["mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"])
def test_weights_that_another_block_has_too_stay(shared: str, how: Prepare) -> None:
    """The block itself would compute the same, but not the other one, whose norm or values stay as they are."""
    model = tiny("llama")
    first, *_, last = model.model.layers
    last.get_submodule(shared).weight = first.get_submodule(shared).weight
    before, weight = logits(model), first.get_submodule(shared).weight.clone()
    prepared(model, how)
    assert torch.equal(first.get_submodule(shared).weight, weight)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))


def test_a_layer_that_stays_dense_is_not_rotated() -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared(model, skip=("o_proj",))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama").to(dtype)
    before = logits(model, OTHERS)
    with caplog.at_level(logging.WARNING, logger="esparse"):
        prepared(model)
    assert not caplog.messages
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert float((logits(model, OTHERS) - before).norm() / before.norm()) < 0.02


def test_wanda_loses_less_of_the_output_projections() -> None:
    """Values of few directions: half of the axes carry nothing, and 2:4 drops exactly these."""
    errors = {}
    for name, how in (("plain", NoPreparation()), ("rotated", RotateHeads())):
        model = tiny("llama")
        for layer in model.model.layers:
            v = layer.self_attn.v_proj.weight.data.view(2, 8, 32)
            mixed = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(5))
            v.copy_(mixed @ v[:, :4])  # the 8 values of a head are sums of 4
        method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), prepare=how)
        pruned = prune(cut(model), IDS, method, stages=Stages())
        errors[name] = [layer.relative_error for layer in pruned.layers if layer.name.endswith("o_proj")]
    assert len(errors["plain"]) == 3
    assert max(errors["rotated"]) < 1e-3 < min(errors["plain"]), errors
