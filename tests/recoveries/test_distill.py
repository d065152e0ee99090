"""Distillation on tiny random models: masks, loss and regularisers by plain loops, and that nothing is left behind."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from esparse.metrics.magnitude import Magnitude
from esparse.models import activations
from esparse.models.blocks import BlockModel
from esparse.patterns import NM, Grouping, Pattern, Unstructured, parse
from esparse.pruning.prune import Method, Pruned, prune
from esparse.records.report import RecoveryReport, Stages
from esparse.recoveries import Chain, NoRecovery, PrunedModel, Recovery, distill_training
from esparse.recoveries.distill import Distill
from esparse.recoveries.distill_training import Pair, divergence
from esparse.recoveries.masked_parameters import Lora, MaskedParameter, dropped, lasso, masked_parameters
from esparse.shuffles import Layers, NoShuffle, Shuffle
from tests.models.families import tiny
from tests.recoveries import PRODUCTS

CPU = torch.device("cpu")
TOKENS_SL = torch.randint(1, 96, (5, 12), generator=torch.Generator().manual_seed(5))
FULL = Distill(
    train="full",
    all_parameters=False,
    rank=4,
    alpha=8.0,
    learning_rate=3e-3,
    scaled=False,
    warm_up=0.1,
    epochs=3,
    fresh=False,
    batch=2,
    clip=1.0,
    temperature=1.0,
    lasso=0.0,
    dropout=0.0,
    products="auto",
)
LORA = replace(FULL, train="lora", learning_rate=1e-2)
FAMILIES = ["llama", "qwen2", "gpt2", "mixtral", "gpt-oss"]  # biases; inputs x outputs; experts; both


class Sorted(Shuffle):
    """Channels in the order of their scores: an order for every matrix, and no group of neighbours."""

    def order(self, scores_OI: Tensor, pattern: Pattern, layers: Layers | None = None) -> Tensor:
        return scores_OI.sum(0).argsort()


def pruned(
    family: str = "llama",
    *,
    pattern: Pattern | None = None,
    shuffle: Shuffle | None = None,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = 24,
    recovery: Recovery | None = None,
) -> tuple[BlockModel, Pruned]:
    blocks = BlockModel(tiny(family).to(dtype), device=CPU, batch_tokens=batch_tokens)
    method = Method(
        metric=Magnitude(),
        pattern=pattern or NM(2, 4),
        shuffle=shuffle or NoShuffle(),
        recovery=recovery or NoRecovery(),
        seed=3,
    )
    return blocks, prune(blocks, TOKENS_SL, method, stages=Stages())


def recover(
    recovery: Distill,
    blocks: BlockModel,
    left: Pruned,
    *,
    parent: nn.Module | None = None,
    seed: int = 0,
    further: Sequence[Tensor] = (),
) -> RecoveryReport:
    parent = parent or tiny(blocks.model.config.model_type.replace("_", "-")).to(blocks.model.dtype)
    [report] = recovery.whole(PrunedModel(blocks, parent, TOKENS_SL, further, left.keeps, left.groupings, seed))
    return report


def trained(recovery: Distill, family: str = "llama", seed: int = 0, **pruning: Any) -> dict[str, Tensor]:
    blocks, left = pruned(family, **pruning)
    recover(recovery, blocks, left, seed=seed)
    return blocks.model.state_dict()


def held_of(family: str, **pruning: Any) -> tuple[BlockModel, list[MaskedParameter]]:
    blocks, left = pruned(family, **pruning)
    return blocks, masked_parameters(left.keeps, left.groupings, CPU)


def outputs_by_inputs(left: Pruned, values: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, Grouping]]:
    """Of every matrix its name, its part of `values`, its keep mask and its grouping."""
    for matrix, grouping in left.groupings:
        keep = left.keeps[matrix.entry]
        keep_OI = keep if matrix.expert is None else keep[matrix.expert]
        yield matrix.name, matrix.part_of(values[matrix.entry]), keep_OI, grouping


def kl_by_hand(parent: nn.Module, student: nn.Module, temperature: float, tokens_SL: Tensor = TOKENS_SL) -> float:
    """Per token and in float64, from the definition."""
    total = 0.0
    for tokens_L in tokens_SL:
        with torch.no_grad():
            wanted_LV, got_LV = (m(tokens_L[None], use_cache=False).logits[0].double() for m in (parent, student))
        for wanted, got in zip(wanted_LV.tolist(), got_LV.tolist(), strict=True):
            p, q = ([math.exp(value / temperature) for value in logits] for logits in (wanted, got))
            p, q = ([value / sum(e) for value in e] for e in (p, q))
            total += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / tokens_SL.numel()


# The loss


def test_divergence_by_hand() -> None:
    # Of two words: p = (3/4, 1/4), q = (1/2, 1/2). At T = 2 logits of 2 log 3 and 0 give p again.
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    for temperature in (1.0, 2.0):
        parent = torch.tensor([[temperature * math.log(3), 0.0], [0.0, 0.0]])
        got = divergence(parent, torch.ones(2, 2), temperature)  # the second token adds nothing
        assert float(got) == pytest.approx(temperature**2 * expected, rel=1e-5)


def test_tokens_that_both_forbid_add_nothing_to_the_divergence() -> None:
    parent, student = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected_of = student.clone().requires_grad_()
    divergence(parent[..., :4], expected_of[..., :4], 2.0).backward()
    parent[..., 4] = student[..., 4] = -torch.inf
    student.requires_grad_()
    found = divergence(parent, student, 2.0)
    found.backward()
    torch.testing.assert_close(found, divergence(parent[..., :4], student[..., :4], 2.0))
    torch.testing.assert_close(student.grad, expected_of.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("batch_tokens", [12, 36])
def test_before_and_after_are_the_loss_per_token(temperature: float, batch_tokens: int) -> None:
    blocks, left = pruned(batch_tokens=batch_tokens)
    parent = tiny("llama")
    before = kl_by_hand(parent, blocks.model, temperature)
    report = recover(replace(FULL, temperature=temperature, epochs=2), blocks, left, parent=parent)
    assert report.before == pytest.approx(before, rel=1e-4)
    assert report.after == pytest.approx(kl_by_hand(parent, blocks.model, temperature), rel=1e-4)
    assert (report.name, report.loss, report.steps) == ("model", "kl", 2 * 3)


def test_the_loss_before_and_after_is_that_of_the_first_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_training, "MEASURED", 2)
    blocks, left = pruned()
    parent = tiny("llama")
    before = kl_by_hand(parent, blocks.model, 1.0, TOKENS_SL[:2])
    report = recover(FULL, blocks, left, parent=parent)
    assert report.before == pytest.approx(before, rel=1e-4)
    assert report.after == pytest.approx(kl_by_hand(parent, blocks.model, 1.0, TOKENS_SL[:2]), rel=1e-4)


def test_with_fresh_samples_the_loss_is_that_of_a_sample_that_no_pass_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update may have fitted the weights to the first: there the loss rises while that of other tokens falls."""
    monkeypatch.setattr(distill_training, "MEASURED", 2)
    fresh = replace(FULL, fresh=True, epochs=2)
    others = [torch.randint(1, 96, (5, 12), generator=torch.Generator().manual_seed(seed)) for seed in (6, 7)]
    blocks, left = pruned()
    parent = tiny("llama")
    before = kl_by_hand(parent, blocks.model, 1.0, others[1][:2])
    read: list[Tensor] = []
    original = distill_training._steps

    def noted(settings: Any, pair: Any, samples: Any, *rest: Any, **named: Any) -> int:
        read.extend(samples)
        return original(settings, pair, samples, *rest, **named)

    monkeypatch.setattr(distill_training, "_steps", noted)
    report = recover(fresh, blocks, left, parent=parent, further=others)
    assert report.before == pytest.approx(before, rel=1e-4)
    assert report.after == pytest.approx(kl_by_hand(parent, blocks.model, 1.0, others[1][:2]), rel=1e-4)
    assert len(read) == 2
    assert torch.equal(read[1], others[0])


@pytest.mark.parametrize(("batch_tokens", "scaled"), [(12, False), (1000, True)])
def test_it_is_adam_on_the_mean_divergence_under_the_mask(batch_tokens: int, scaled: bool) -> None:
    blocks, left = pruned(batch_tokens=batch_tokens)
    dense, plain = tiny("llama"), copy.deepcopy(blocks.model)
    with torch.no_grad():
        log_p = dense(TOKENS_SL, use_cache=False).logits.log_softmax(-1)
    weights = {name: p for name, p in plain.named_parameters() if name in left.keeps}
    sizes = {name: float(p.data[left.keeps[name]].square().mean().sqrt()) for name, p in weights.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    for step, share in enumerate((1.0, 2 / 3, 1 / 3), start=1):
        plain.zero_grad()
        log_q = plain(TOKENS_SL, use_cache=False).logits.log_softmax(-1)
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
        grads = {name: p.grad * left.keeps[name] for name, p in weights.items()}
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        assert norm > 0.01
        for name, parameter in weights.items():
            grad = grads[name] * 0.01 / norm
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.999 * v[name] + 0.001 * grad**2
            change = m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            parameter.data -= (0.2 * sizes[name] if scaled else 1e-2) * share * change
    settings = replace(FULL, epochs=3, batch=len(TOKENS_SL), warm_up=0.0, clip=0.01, scaled=scaled)
    settings = replace(settings, learning_rate=0.2 if scaled else 1e-2)
    report = recover(settings, blocks, left, parent=dense)
    assert report.after < report.before
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(blocks.model.get_parameter(name), parameter, atol=1e-5, rtol=0)


def test_later_passes_read_further_samples(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = replace(FULL, fresh=True, batch=5)
    assert (fresh.further_samples(), FULL.further_samples()) == (3, 0)  # one to measure the loss on
    assert Chain(first=FULL, second=fresh).further_samples() == 3
    monkeypatch.setattr(logging.getLogger("esparse"), "propagate", True)
    caplog.set_level(logging.INFO, "esparse")
    others = [torch.randint(1, 96, (5, 12), generator=torch.Generator().manual_seed(seed)) for seed in (6, 7)]
    blocks, left = pruned()
    read: list[int] = []
    parent = tiny("llama")

    def noted(_module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        read.extend(row[:8] for row in given["input_ids"].tolist())

    with parent.register_forward_pre_hook(noted, with_kwargs=True):
        recover(fresh, blocks, left, parent=parent, further=others)
    passes = [sorted(read[at : at + 5]) for at in range(1, len(read), 5)]  # in front of them the head is tried
    assert passes == [sorted(of[:, :8].tolist()) for of in (TOKENS_SL, TOKENS_SL, *others, TOKENS_SL)]
    assert "every pass" not in caplog.text
    recover(fresh, *pruned())
    assert "given as tokens: every pass of the distillation reads the same ones" in caplog.text


@pytest.mark.parametrize("recovery", [FULL, LORA, replace(FULL, all_parameters=True)], ids=["full", "lora", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits behind the head, so that none are cut
def test_logits_of_a_few_tokens_at_once_train_alike(
    recovery: Distill, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, _ = pruned(family)
    heads = Pair.of(blocks, tiny(family), 1.0, TOKENS_SL).heads
    assert (heads is None) == (family == "gemma2")
    whole = trained(recovery, family)
    most = []
    counted = distill_training.divergence

    def noted(wanted_BLV: Tensor, got_BLV: Tensor, temperature: float) -> Tensor:
        most.append(wanted_BLV.shape[1])
        return counted(wanted_BLV, got_BLV, temperature)

    monkeypatch.setattr(distill_training, "divergence", noted)
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", 96 * 2 * 5)  # five tokens of two sequences
    for name, value in trained(recovery, family).items():
        torch.testing.assert_close(value, whole[name], atol=2e-4, rtol=0)
    assert max(most) == (12 if family == "gemma2" else 10)  # 10: of a single sequence


# What is left


@pytest.mark.parametrize(
    ("family", "recovery"), list(product(FAMILIES, [FULL, LORA])), ids=lambda v: getattr(v, "train", v)
)
def test_loss_falls_masks_hold_and_nothing_else_changes(family: str, recovery: Distill) -> None:
    blocks, left = pruned(family, shuffle=Sorted())
    for _, weight_OI, keep_OI, _ in outputs_by_inputs(left, blocks.model.state_dict()):
        weight_OI.masked_fill_(~keep_OI, -0.0)
    parent, before = tiny(family), {k: v.clone() for k, v in blocks.model.state_dict().items()}
    report = recover(recovery, blocks, left, parent=parent)
    assert report.after < 0.9 * report.before
    after = blocks.model.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        if name not in left.keeps:
            assert torch.equal(value, before[name]), name
    for name, weight_OI, keep_OI, grouping in outputs_by_inputs(left, after):
        assert torch.equal(weight_OI != 0, keep_OI), name
        assert grouping.holds(weight_OI != 0)
        assert not torch.signbit(weight_OI[~keep_OI]).any()
    changed = [name for name in left.keeps if not torch.equal(after[name], before[name])]
    assert changed == list(left.keeps)
    for name, value in tiny(family).state_dict().items():
        assert torch.equal(parent.state_dict()[name], value)


@pytest.mark.parametrize("recovery", [FULL, LORA, replace(FULL, all_parameters=True)])
def test_no_gradient_hook_or_parametrisation_is_left(recovery: Distill) -> None:
    blocks, left = pruned()
    blocks.model.lm_head.weight.requires_grad_(False)
    required = {name: p.requires_grad for name, p in blocks.model.named_parameters()}
    identities = {name: id(p) for name, p in blocks.model.named_parameters()}
    parent = tiny("llama")
    recover(recovery, blocks, left, parent=parent)
    assert {name: p.requires_grad for name, p in blocks.model.named_parameters()} == required
    assert {name: id(p) for name, p in blocks.model.named_parameters()} == identities
    assert torch.is_grad_enabled()
    for parameter in [*blocks.model.parameters(), *parent.parameters()]:
        assert parameter.grad is None
        assert not parameter._backward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in blocks.model.modules())
    assert not any(hasattr(m, "parametrizations") for m in blocks.model.modules())


def test_all_parameters_means_norms_and_embeddings_too() -> None:
    dense, after = tiny("llama").state_dict(), trained(replace(FULL, all_parameters=True))
    assert not [name for name, value in after.items() if torch.equal(value, dense[name])]
    zeros = [int((value == 0).sum()) for name, value in after.items() if name.endswith("proj.weight")]
    assert zeros == [value.numel() // 2 for name, value in after.items() if name.endswith("proj.weight")]


@pytest.mark.parametrize("recovery", [FULL, replace(LORA, dropout=0.2, lasso=1e-4, epochs=1)], ids=["full", "lora"])
def test_one_seed_one_result(recovery: Distill) -> None:
    first, again, other = (trained(recovery, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("recovery", [FULL, replace(LORA, dropout=0.2, lasso=1e-4)], ids=["full", "lora"])
def test_micro_batches_do_not_matter(recovery: Distill) -> None:
    small, large = (trained(recovery, batch_tokens=tokens) for tokens in (12, 1000))
    for name, value in small.items():
        torch.testing.assert_close(value, large[name], atol=2e-4, rtol=0)


@pytest.mark.parametrize("recovery", [FULL, LORA], ids=["full", "lora"])
def test_half_precision_comes_back_in_its_own_precision(recovery: Distill) -> None:
    blocks, left = pruned(dtype=torch.bfloat16)
    report = recover(recovery, blocks, left)
    assert report.after < report.before
    assert {p.dtype for p in blocks.model.parameters()} == {torch.bfloat16}
    assert (
        blocks.model.model.rotary_emb.inv_freq.dtype == tiny("llama").to(torch.bfloat16).model.rotary_emb.inv_freq.dtype
    )
    for name, keep in left.keeps.items():
        weight = blocks.model.state_dict()[name]
        assert not torch.signbit(weight[weight == 0]).any()
        assert not weight[~keep].any()


@pytest.mark.parametrize(("dtype", "products", "expected"), PRODUCTS)
@pytest.mark.parametrize("recovery", [FULL, LORA], ids=["full", "lora"])
def test_products_of_the_training_have_the_model_s_precision(
    recovery: Distill, dtype: torch.dtype, products: str, expected: torch.dtype
) -> None:
    blocks, left = pruned(dtype=dtype)
    seen = set()
    layer = blocks.model.get_submodule(next(iter(left.keeps)).removesuffix(".weight"))
    # Trained weights are in float32, so that small steps are not lost. LoRA trains others than the layer's
    held = expected if recovery is LORA else torch.float32

    def look(module: nn.Module, _inputs: Any, out: Tensor) -> None:
        if torch.is_grad_enabled():
            assert {module.weight.dtype, blocks.model.lm_head.weight.dtype} == {held}
            seen.add(out.dtype)

    with layer.register_forward_hook(look):
        report = recover(replace(recovery, products=products), blocks, left)
    assert seen == {expected}
    assert report.after < report.before


def test_zeros_are_positive_once_settled() -> None:
    weight = nn.Parameter(torch.tensor([[-1.0, -0.0, 2.0, -3.0]]))
    MaskedParameter("w", weight, torch.tensor([[True, True, False, True]]), False, []).settle()
    assert weight.tolist() == [[-1, 0, 0, -3]]
    assert torch.signbit(weight.data).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("recovery", [FULL, LORA, replace(FULL, all_parameters=True)])
def test_a_model_that_would_get_worse_stays_as_it_was(recovery: Distill, caplog: pytest.LogCaptureFixture) -> None:
    blocks, left = pruned()
    before = {name: value.clone() for name, value in blocks.model.state_dict().items()}
    logging.getLogger("esparse").propagate = True
    report = recover(replace(recovery, learning_rate=30.0), blocks, left)
    assert report.after == report.before
    assert all(torch.equal(value, before[name]) for name, value in blocks.model.state_dict().items())
    assert "was undone" in caplog.text


def test_logits_that_are_not_finite_are_refused() -> None:
    blocks, left = pruned()
    parent = tiny("llama")
    parent.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the training of the whole model cannot begin"):
        recover(FULL, blocks, left, parent=parent)


# LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_computes_its_formula_and_merges_what_it_computed(family: str) -> None:
    blocks, left = pruned(family)
    masked = masked_parameters(left.keeps, left.groupings, CPU)
    start = {name: value.clone() for name, value in blocks.model.state_dict().items()}
    lora = Lora(masked, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(1))
    pairs = dict(zip((of.entry for of in masked), zip(lora.leaves[::2], lora.leaves[1::2], strict=True), strict=True))
    for name, value in lora.weights().items():
        assert torch.equal(value, start[name])  # B is zero
    for down, up in pairs.values():
        bound = 1 / math.sqrt(down.shape[-1])
        assert 0.7 * bound < float(down.detach().abs().max()) <= bound
        up.data.normal_(generator=torch.Generator().manual_seed(2))
    weights = lora.weights()
    for matrix, _ in left.groupings:
        down, up = (f if matrix.expert is None else f[matrix.expert] for f in pairs[matrix.entry])
        keep = left.keeps[matrix.entry] if matrix.expert is None else left.keeps[matrix.entry][matrix.expert]
        got_OI, start_OI = matrix.part_of(weights[matrix.entry]), matrix.part_of(start[matrix.entry])
        down, up = down.tolist(), up.tolist()
        for o, i in product(range(0, keep.shape[0], 7), range(keep.shape[1])):
            low_rank = sum(up[o][r] * down[r][i] for r in range(3))
            expected = float(start_OI[o, i]) + 2.0 * low_rank if keep[o, i] else 0.0
            assert got_OI[o, i].item() == pytest.approx(expected, abs=1e-5)
    inputs = {"input_ids": TOKENS_SL, "use_cache": False}
    with torch.no_grad():
        computed = functional_call(blocks.model, weights, kwargs=inputs).logits
        lora.merge()
        assert torch.equal(blocks.model(**inputs).logits, computed)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_lora_of_a_model_in_bfloat16_is_what_float32_would_be_rounded(family: str) -> None:
    def added(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
        blocks, left = pruned(family, dtype=torch.bfloat16)
        blocks.model.to(dtype)
        masked = masked_parameters(left.keeps, left.groupings, CPU)
        lora = Lora(masked, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(1))
        for up in lora.leaves[1::2]:
            up.data.normal_(generator=torch.Generator().manual_seed(2))
        weights = lora.weights()
        sum((value.float() ** 2).sum() for value in weights.values()).backward()  # type: ignore[union-attr]
        assert all(leaf.dtype == leaf.grad.dtype == torch.float32 for leaf in lora.leaves if leaf.grad is not None)
        return {name: value.detach() for name, value in weights.items()}, [leaf.grad for leaf in lora.leaves]  # type: ignore[misc]

    (half, half_grads), (single, single_grads) = added(torch.bfloat16), added(torch.float32)
    for name, value in half.items():
        assert torch.equal(value, single[name].to(torch.bfloat16)), name
    for got, expected in zip(half_grads, single_grads, strict=True):
        assert torch.linalg.vector_norm(got - expected) < 0.01 * torch.linalg.vector_norm(expected)


# The regularisers


@pytest.mark.parametrize(
    ("family", "pattern"), [("llama", "2:5"), ("gpt2", "2:4"), ("mixtral", "2:4"), ("gpt-oss", "1:3")]
)
def test_lasso_is_the_sum_of_the_norms_of_all_groups(family: str, pattern: str) -> None:
    _blocks, left = pruned(family, pattern=parse(pattern), shuffle=Sorted())
    masked = masked_parameters(left.keeps, left.groupings, CPU)
    m, expected = int(pattern[2:]), 0.0
    for matrix, grouping in left.groupings:
        order = grouping.order_I.tolist()
        for row in matrix.view().tolist():
            for start in range(0, len(order), m):
                expected += math.sqrt(sum(row[channel] ** 2 for channel in order[start : start + m]))
    got = lasso(masked, {of.entry: of.parameter for of in masked})
    assert float(got.detach()) == pytest.approx(expected, rel=1e-4)


def test_lasso_with_outliers_takes_the_groups_of_the_base() -> None:
    _, left = pruned(pattern=parse("2:4", "2:8"))
    masked = masked_parameters(left.keeps, left.groupings, CPU)
    expected = sum(
        float(row[start : start + 4].norm())
        for matrix, _ in left.groupings
        for row in matrix.view()
        for start in range(0, len(row), 4)
    )
    assert float(lasso(masked, {of.entry: of.parameter.data for of in masked})) == pytest.approx(expected, rel=1e-4)


def test_a_group_of_zeros_has_no_gradient() -> None:
    weight = nn.Parameter(torch.tensor([[0.0, 0.0, 3.0, 4.0]]))
    masked = [MaskedParameter("w", weight, weight.data != 0, False, [Grouping(NM(1, 2))])]
    lasso(masked, {"w": weight}).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 0.0, 0.6, 0.8]]))


@pytest.mark.parametrize("recovery", [FULL, LORA], ids=["full", "lora"])
def test_lasso_shrinks_groups(recovery: Distill) -> None:
    norms = []
    for weight in (0.0, 1e-3):
        blocks, left = pruned(shuffle=Sorted())
        masked = masked_parameters(left.keeps, left.groupings, CPU)
        recover(replace(recovery, lasso=weight, learning_rate=1e-3), blocks, left)
        norms.append(float(lasso(masked, {of.entry: of.parameter.data for of in masked})))
    assert norms[1] < norms[0] - 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_dropout_takes_whole_groups_of_inputs(family: str) -> None:
    _, left = pruned(family, pattern=NM(2, 5), shuffle=Sorted())
    masked = masked_parameters(left.keeps, left.groupings, CPU)
    factors = dropped(masked, 0.25, torch.Generator().manual_seed(0))
    drawn, seen = [], set()
    for matrix, grouping in left.groupings:
        factor_OI = matrix.part_of(factors[matrix.entry].expand_as(matrix.parameter))
        assert (factor_OI == factor_OI[0]).all()
        order = grouping.order_I.tolist()
        groups = [factor_OI[0, order[start : start + 5]].tolist() for start in range(0, len(order), 5)]
        assert all(len(set(group)) == 1 for group in groups)
        drawn += [group[0] for group in groups]
        seen.add(tuple(drawn[-len(groups) :]))
    assert sorted(set(drawn)) == pytest.approx([0, 4 / 3])
    assert 0.12 < drawn.count(0.0) / len(drawn) < 0.4
    assert len(seen) > 0.8 * len(left.groupings)  # every matrix draws for itself


def test_dropout_is_used_in_training_and_gone_afterwards() -> None:
    plain, with_dropout = (trained(replace(FULL, dropout=dropout)) for dropout in (0.0, 0.3))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(plain[name], with_dropout[name])
    assert torch.equal(plain[name] != 0, with_dropout[name] != 0)


def test_a_pattern_without_groups_is_passed_over_and_named(caplog: pytest.LogCaptureFixture) -> None:
    blocks, left = pruned(pattern=Unstructured(50))
    logging.getLogger("esparse").propagate = True
    assert recover(replace(FULL, lasso=1e-3, dropout=0.1, epochs=1), blocks, left).steps == 3
    assert "skip layers" in caplog.text
    assert "model.layers.0.self_attn.q_proj.weight" in caplog.text


# In the block loop


def test_pruning_ends_with_it_and_measures_against_the_dense_model() -> None:
    _blocks, left = pruned(recovery=Chain(first=FULL, second=LORA))
    plain, _ = pruned()
    first, second = left.recoveries
    assert first.before == pytest.approx(kl_by_hand(tiny("llama"), plain.model, 1.0), rel=1e-4)
    assert second.after <= second.before == first.after < first.before
    assert left.pattern_holds
    assert left.kept * 2 == left.weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "half"}, "full or lora, got 'half'"),
        ({"train": "lora", "all_parameters": True}, "recovery.train=full"),
        ({"products": "half"}, "auto or float32, got 'half'"),
        ({"train": "lora", "scaled": True}, "recovery.train=full"),
        ({"rank": 0}, "recovery.rank must be positive, got 0"),
        ({"epochs": 0}, "recovery.epochs"),
        ({"batch": 0}, "recovery.batch"),
        ({"alpha": 0.0}, "recovery.alpha must be positive"),
        ({"learning_rate": -1.0}, "recovery.learning_rate must be positive and finite, got -1"),
        ({"temperature": 0.0}, "recovery.temperature"),
        ({"clip": 0.0}, "recovery.clip"),
        ({"warm_up": 1.5}, "recovery.warm_up"),
        ({"dropout": 1.0}, "recovery.dropout is a probability"),
        ({"lasso": -0.1}, "recovery.lasso"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FULL, **settings)


def test_regularisers_want_groups() -> None:
    FULL.check(Unstructured(50))
    replace(FULL, lasso=1.0, dropout=0.1).check(parse("2:4", "4:8"))
    for setting in ("lasso", "dropout"):
        with pytest.raises(ValueError, match="50% has none"):
            replace(FULL, **{setting: 0.1}).check(Unstructured(50))
