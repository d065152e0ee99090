"""Block reconstruction: masks held, losses falling, and the right tensors compared with each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esparse.metrics.wanda import Wanda
from esparse.models.activations import Activations
from esparse.models.blocks import BlockModel
from esparse.models.training import LEAST, at_rate
from esparse.patterns import NM
from esparse.pruning.prune import Method, Pruned, prune
from esparse.records.report import Stages
from esparse.recoveries import Chain, NoRecovery, Recovery
from esparse.recoveries.window import Window
from esparse.shuffles import NoShuffle
from tests.models.families import FAMILIES, tiny
from tests.recoveries import PRODUCTS

TOKENS_SL = torch.randint(1, 96, (6, 20), generator=torch.Generator().manual_seed(5))


def window(**settings: Any) -> Window:
    usual: dict[str, Any] = {
        "window": "submodule",
        "inputs": "propagated",
        "targets": "block",
        "train": "weights",
        "learning_rate": 1e-3,
        "scaled": False,
        "final_rate": 0.0,
        "decay": "linear",
        "warm_up": 0.0,
        "epochs": 2,
        "batch": 2,
        "beta2": 0.999,
        "weight_decay": 0.0,
        "clip": None,
        "products": "auto",
    }
    return Window(**usual | settings)


def run(
    recovery: Recovery, family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.nn.Module, Pruned]:
    model = tiny(family).to(dtype)
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=40)
    method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), recovery=recovery, seed=seed)
    return model, prune(blocks, TOKENS_SL, method, stages=Stages())


@pytest.mark.parametrize(
    ("family", "train"), [*((family, "weights") for family in FAMILIES), ("llama", "all"), ("mixtral", "all")]
)
def test_losses_fall_and_masks_hold_in_every_family(family: str, train: str) -> None:
    model, pruned = run(window(train=train, epochs=1), family)
    assert pruned.pattern_holds
    assert len(pruned.recoveries) >= 3  # one window per block at least
    assert all(report.after <= report.before for report in pruned.recoveries)
    assert sum(report.after for report in pruned.recoveries) < sum(report.before for report in pruned.recoveries)
    for matrix, _ in pruned.groupings:
        keep = pruned.keeps[matrix.entry]
        weight = matrix.view()[~(keep if matrix.expert is None else keep[matrix.expert])]
        assert not (weight != 0).any()
        assert not torch.signbit(weight).any()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_windows_of_the_families() -> None:
    def names(family: str, **settings: Any) -> list[str]:
        return [report.name for report in run(window(**settings), family)[1].recoveries[:2]]

    assert names("llama") == ["model.layers.0.self_attn", "model.layers.0"]
    assert names("opt") == ["model.decoder.layers.0.self_attn", "model.decoder.layers.0"]  # fc1, fc2 stand in the block
    assert names("gpt2") == ["transformer.h.0.attn", "transformer.h.0"]
    assert names("mixtral") == ["model.layers.0.self_attn", "model.layers.0"]
    assert names("llama", window="block") == ["model.layers.0", "model.layers.1"]


def test_only_surviving_weights_change_unless_all_is_asked_for() -> None:
    plain, _ = run(NoRecovery())
    weights, pruned = run(window())
    everything, _ = run(window(train="all"))
    changed = {n for n, p in plain.state_dict().items() if not torch.equal(p, weights.state_dict()[n])}
    assert changed <= set(pruned.keeps)
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(plain.state_dict()[norm], everything.state_dict()[norm])
    head = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert all(torch.equal(plain.state_dict()[name], everything.state_dict()[name]) for name in head)


@pytest.mark.parametrize("settings", [{}, {"inputs": "dense"}, {"targets": "parent"}])
def test_the_reported_loss_is_the_mean_squared_error_to_the_right_target(settings: dict[str, str]) -> None:
    """The last block's attention window, recomputed from the two models alone."""
    recovery = window(**settings)
    dense, (model, pruned) = tiny("llama"), run(recovery)
    last = pruned.recoveries[-2]
    assert last.name == "model.layers.2.self_attn"

    def entering(of: torch.nn.Module) -> Activations:
        blocks = BlockModel(of, device=torch.device("cpu"), batch_tokens=40)
        stream = Activations(blocks, TOKENS_SL, 2)
        stream.advance(0)
        stream.advance(1)
        return stream

    def attention(weights_of: torch.nn.Module, stream: Activations) -> torch.Tensor:
        seen = []
        blocks = BlockModel(weights_of, device=torch.device("cpu"), batch_tokens=40)
        other = Activations(blocks, TOKENS_SL, 2)
        hook = weights_of.model.layers[2].self_attn.register_forward_hook(lambda *call: seen.append(call[-1][0]))
        other.hidden = stream.hidden
        other.observe(2)
        hook.remove()
        return torch.cat(seen)

    inputs = entering(dense if recovery.inputs == "dense" else model)
    targets = entering(dense) if recovery.targets == "parent" else inputs
    after = (attention(model, inputs) - attention(dense, targets)).square().mean()
    assert last.after == pytest.approx(float(after), rel=1e-4)


@pytest.mark.parametrize(("dtype", "products", "expected"), PRODUCTS)
@pytest.mark.parametrize("where", ["submodule", "block"])
def test_products_of_the_training_have_the_model_s_precision(
    where: str, dtype: torch.dtype, products: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    forward = torch.nn.Linear.forward

    def noted(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        out = forward(layer, inputs)
        if torch.is_grad_enabled() and layer.weight.requires_grad:
            assert layer.weight.dtype == torch.float32  # so that small steps are not lost
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    model, pruned = run(window(window=where, products=products), dtype=dtype)
    assert seen == {expected}
    assert all(part.after < part.before for part in pruned.recoveries)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_recovered_model_is_closer_to_the_dense_one() -> None:
    dense = tiny("llama")(TOKENS_SL).logits

    def distance(recovery: Recovery) -> float:
        return float((run(recovery)[0](TOKENS_SL).logits - dense).square().mean().detach())

    plain = distance(NoRecovery())
    for settings in ({}, {"window": "block"}, {"inputs": "dense"}, {"targets": "parent"}):
        assert distance(window(epochs=6, **settings)) < plain


@pytest.mark.parametrize("rate", [1e3, 1e25])  # the second ends in NaN
def test_a_loss_that_rises_is_undone(rate: float) -> None:
    plain, _ = run(NoRecovery())
    model, pruned = run(window(learning_rate=rate, epochs=1))
    assert all(report.after == report.before for report in pruned.recoveries)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_first_step_is_as_long_as_the_rate_says(scaled: bool) -> None:
    """Of AdamW's first step only the gradient's sign counts: each kept weight moves by the rate."""
    before = run(NoRecovery())[0].state_dict()
    after = run(window(learning_rate=1e-3, scaled=scaled, epochs=1, batch=6))[0].state_dict()
    for layer in ("self_attn.q_proj", "mlp.down_proj"):  # of the first block, so that both began alike
        old, new = (weights[f"model.layers.0.{layer}.weight"] for weights in (before, after))
        kept = old[old != 0]
        rate = 1e-3 * (float(kept.square().mean().sqrt()) if scaled else 1.0)
        moved = (new - old)[old != 0].abs()
        assert float(moved.max()) == pytest.approx(rate, rel=1e-2)
        assert float(moved.median()) == pytest.approx(rate, rel=0.03)  # of small gradients AdamW's epsilon counts


def test_a_tensor_of_zeros_can_move() -> None:
    at_zero, sized = at_rate([torch.zeros(3), torch.tensor([0.0, 3.0, -4.0])], 0.1, scaled=True)
    assert at_zero["lr"] == 0.1 * LEAST
    assert sized["lr"] == pytest.approx(0.1 * 12.5**0.5)


def test_one_seed_one_result() -> None:
    first, second, other = run(window())[0], run(window())[0], run(window(), seed=1)[0]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_half_precision_is_trained_in_float32_and_comes_back() -> None:
    model, pruned = run(window(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert pruned.pattern_holds
    assert pruned.kept <= pruned.weights / 2
    assert all(report.after <= report.before for report in pruned.recoveries)


def test_two_recoveries_in_a_row() -> None:
    _, pruned = run(Chain(first=window(), second=window(window="block")))
    assert [report.name.removeprefix("model.layers.0") for report in pruned.recoveries[:3]] == [".self_attn", "", ""]
    assert pruned.recoveries[2].before == pytest.approx(pruned.recoveries[1].after, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": "layer"}, "recovery.window must be one of submodule, block, got 'layer'"),
        ({"targets": "teacher"}, "recovery.targets must be one of block, parent, got 'teacher'"),
        ({"epochs": 0}, "recovery.epochs must be positive, got 0"),
        ({"learning_rate": 0.0}, "recovery.learning_rate must be positive and finite, got 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        window(**settings)
