"""Squared gradients against torch.autograd.grad, sequence by sequence, and the masks that come of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esparse.metrics import Metric
from esparse.metrics.fisher import Fisher
from esparse.metrics.gradient import Gradient
from esparse.models.activations import Activations
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.patterns import NM
from esparse.pruning import gradients
from esparse.pruning.prune import Method, Pruned, prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from esparse.stats import LayerStats
from tests.models.families import tiny

TOKENS_SL = torch.randint(1, 96, (5, 14), generator=torch.Generator().manual_seed(5))
FAMILIES = ("llama", "mixtral", "gpt2")
ROUTERS = (".gate.weight", ".router.weight")


def cut(model: nn.Module) -> BlockModel:
    return BlockModel(model, device=torch.device("cpu"), batch_tokens=10**6)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def prunable(model: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """The matrices of one block by their names: all that has two dimensions or more and is no router."""
    prefix = "transformer.h" if hasattr(model, "transformer") else "model.layers"
    named = blocks_of(model)[index].named_parameters(prefix=f"{prefix}.{index}")
    return {name: p for name, p in named if p.ndim > 1 and not name.endswith(ROUTERS)}


def mean_square(losses: list[Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Oracle: the gradient of each sequence's loss, squared, averaged."""
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for loss in losses:
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name] += grad.double() ** 2
    return {name: square / len(losses) for name, square in total.items()}


def losses_of_model(model: nn.Module, tokens_SL: Tensor = TOKENS_SL) -> list[Tensor]:
    """The mean of -log p(next token) over the tokens of each sequence."""
    losses = []
    for tokens_L in tokens_SL:
        log_p_LV = torch.log_softmax(model(tokens_L[None], use_cache=False).logits[0].double(), dim=-1)
        places = range(len(tokens_L) - 1)
        losses.append(-sum(log_p_LV[t, tokens_L[t + 1]] for t in places) / len(places))
    return losses


def losses_of_block(model: nn.Module, index: int, tokens_SL: Tensor = TOKENS_SL) -> list[Tensor]:
    """The l2 norm of what the block returns for each sequence."""
    losses = []
    for tokens_L in tokens_SL:
        returned: list[Tensor] = []
        hook = blocks_of(model)[index].register_forward_hook(lambda m, a, out, to=returned: to.append(out))
        model(tokens_L[None], use_cache=False)
        hook.remove()
        out = returned[0][0] if isinstance(returned[0], tuple) else returned[0]
        losses.append(out.double().square().sum().sqrt())
    return losses


def of_model(model: nn.Module, index: int, **settings: object) -> dict[str, Tensor]:
    return gradients.of_model(cut(model), TOKENS_SL, **settings)


def of_block(model: nn.Module, index: int, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    activations = Activations(cut(model), TOKENS_SL, 1)
    for before in range(index):
        activations.advance(before)
    return gradients.of_block(Block(index, activations, None, skip, 0))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, square in expected.items():
        assert got[name].dtype == torch.float32
        scale = square.max().item()
        assert scale > 0
        torch.testing.assert_close(got[name].double(), square, rtol=1e-3, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_model_is_the_mean_of_the_squares_of_each_sequences_gradient(family: str) -> None:
    model = tiny(family)
    expected: dict[str, Tensor] = {}
    for index in range(3):
        expected |= mean_square(losses_of_model(model), prunable(model, index))
    got = of_model(model, 0)
    assert set(got) == set(expected)
    assert_close(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("index", [0, 2])
def test_of_a_block_is_the_gradient_of_its_outputs_norm(family: str, index: int) -> None:
    model = tiny(family)
    expected = mean_square(losses_of_block(model, index), prunable(model, index))
    got = of_block(model, index)
    assert set(got) == set(expected)
    assert_close(got, expected)


def test_of_a_block_whose_hidden_states_are_several_streams() -> None:
    """Gemma 3n's have four in front of the sequences."""
    model = tiny("gemma3n")
    got = of_block(model, 0)
    named = dict(blocks_of(model)[0].named_parameters(prefix="model.layers.0"))
    assert "model.layers.0.mlp.up_proj.weight" in got
    assert_close(got, mean_square(losses_of_block(model, 0), {name: named[name] for name in got}))


@pytest.mark.parametrize("take", [of_model, of_block])
def test_the_model_is_as_before(take: Callable[..., dict[str, Tensor]]) -> None:
    model = tiny("llama")
    names = [name for name, _ in model.named_parameters()]
    flags = {name: place % 3 != 0 for place, name in enumerate(names)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take(model, 1)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("take", [of_model, of_block])
def test_no_two_gradients_stand_in_memory_at_once(
    take: Callable[..., dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    standing: list[int] = []
    add = Tensor.addcmul_

    def watched(self: Tensor, *args: Tensor, **kwargs: float) -> Tensor:
        standing.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return add(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "addcmul_", watched)
    take(model, 0)
    assert len(standing) == len(TOKENS_SL) * 7 * (3 if take is of_model else 1)
    assert set(standing) == {1}


@pytest.mark.parametrize("take", [of_model, of_block])
def test_skipped_layers_have_none(take: Callable[..., dict[str, Tensor]]) -> None:
    got = take(tiny("llama"), 0, skip=(r"layers\.[12]\.", "o_proj"))
    assert set(got) == {name for name in prunable(tiny("llama"), 0) if "o_proj" not in name}
    assert take(tiny("llama"), 0, skip=("",)) == {}


def test_in_half_precision_small_gradients_do_not_vanish() -> None:
    """Those of the mean loss are about float16's least number here (6e-8), and would be 86 % off."""
    model = tiny("llama")
    with torch.no_grad():
        blocks_of(model)[0].self_attn.o_proj.weight *= 1e-3
        model.lm_head.weight *= 1e-3
    name = "model.layers.0.self_attn.v_proj.weight"
    tokens_SL = TOKENS_SL.repeat(1, 4)  # 56 tokens
    expected = mean_square(losses_of_model(model, tokens_SL), prunable(model, 0))[name]
    got = gradients.of_model(cut(model.half()), tokens_SL)[name].double()
    assert (got - expected).norm() < 0.1 * expected.norm()


def test_one_token_is_no_text() -> None:
    with pytest.raises(ValueError, match=r"calibration.length of at least 2 tokens, got 1"):
        gradients.of_model(cut(tiny("llama")), TOKENS_SL[:, :1])


def test_a_model_that_does_not_fit_is_told_of_the_other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = cut(tiny("llama"))

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(blocks.model, "forward", full)
    with pytest.raises(ValueError, match=r"do not fit on cpu: use metric.source=block"):
        gradients.of_model(blocks, TOKENS_SL)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in blocks.model.parameters())


def pruned_by(metric: Metric, family: str = "llama") -> Pruned:
    method = Method(metric=metric, pattern=NM(2, 4), shuffle=NoShuffle())
    return prune(cut(tiny(family)), TOKENS_SL, method, stages=Stages())


def keep_by_loops(score: list[list[float]]) -> Tensor:
    keep = []
    for row in score:
        kept: set[int] = set()
        for start in range(0, len(row), 4):
            kept |= set(sorted(range(start, start + 4), key=lambda i: (-row[i], i))[:2])
        keep.append([i in kept for i in range(len(row))])
    return torch.tensor(keep)


@pytest.mark.parametrize("source", ["model", "block"])
def test_masks_of_the_first_block_by_the_plain_formulas(source: str) -> None:
    model = tiny("llama")
    linears = {name: m for name, m in blocks_of(model)[0].named_modules() if isinstance(m, nn.Linear)}
    sums: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: sums.__setitem__(name, args[0].double().square().sum((0, 1)))
        )
        for name, linear in linears.items()
    ]
    model(TOKENS_SL, use_cache=False)
    for hook in hooks:
        hook.remove()
    losses = losses_of_model(model) if source == "model" else losses_of_block(model, 0)
    squares = mean_square(losses, prunable(model, 0))
    blended = pruned_by(Gradient(source=source, alpha=100.0)).keeps
    fisher = pruned_by(Fisher(source=source)).keeps
    for name, linear in linears.items():
        entry = f"model.layers.0.{name}.weight"
        weight, square = linear.weight.double().tolist(), squares[entry].tolist()
        norm = [(total / len(TOKENS_SL)) ** 0.5 for total in sums[name].tolist()]
        rows, columns = range(len(weight)), range(len(norm))
        by_norm = [[abs(weight[o][i]) * (100 * square[o][i] ** 0.5 + norm[i]) for i in columns] for o in rows]
        by_fisher = [[weight[o][i] ** 2 * square[o][i] for i in columns] for o in rows]
        assert torch.equal(blended[entry], keep_by_loops(by_norm)), name
        assert torch.equal(fisher[entry], keep_by_loops(by_fisher)), name


@pytest.mark.parametrize("source", ["model", "block"])
def test_later_blocks_see_what_the_pruned_ones_return_and_the_models_gradients_are_dense(source: str) -> None:
    pruned = pruned_by(Fisher(source=source))
    model = tiny("llama")
    if source == "block":
        for name, parameter in prunable(model, 0).items():
            parameter.data *= pruned.keeps[name]
    losses = losses_of_model(model) if source == "model" else losses_of_block(model, 1)
    for name, square in mean_square(losses, prunable(model, 1)).items():
        score = dict(model.named_parameters())[name].detach().double() ** 2 * square
        assert torch.equal(pruned.keeps[name], keep_by_loops(score.tolist())), name


@pytest.mark.parametrize("source", ["model", "block"])
def test_gpt2s_gradients_reach_the_metric_as_outputs_by_inputs(source: str) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    class Watching(Fisher):
        def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
            seen[stats.name] = weight_OI, stats["gradient"].mean_square_OI
            return Fisher.score(self, weight_OI, stats)

    pruned_by(Watching(source=source), "gpt2")
    model = tiny("gpt2")
    losses = losses_of_model(model) if source == "model" else losses_of_block(model, 0)
    for name, square_IO in mean_square(losses, prunable(model, 0)).items():
        weight_OI, square_OI = seen[name.removesuffix(".weight")]
        assert torch.equal(weight_OI, model.state_dict()[name].T)
        assert_close({"": square_OI}, {"": square_IO.T})


@pytest.mark.parametrize("source", ["model", "block"])
def test_every_expert_gets_its_own_part(source: str) -> None:
    pruned = pruned_by(Fisher(source=source), "mixtral")
    model = tiny("mixtral")
    losses = losses_of_model(model) if source == "model" else losses_of_block(model, 0)
    name = "model.layers.0.mlp.experts.down_proj"
    square_EOI = mean_square(losses, prunable(model, 0))[name]
    for expert in range(4):
        score_OI = model.state_dict()[name][expert].double() ** 2 * square_EOI[expert]
        assert torch.equal(pruned.keeps[name][expert], keep_by_loops(score_OI.tolist()))
