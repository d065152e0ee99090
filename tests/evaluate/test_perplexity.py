"""Perplexity against the formula on the model's own logits."""

from __future__ import annotations

import math
import re

import pytest
import torch

import esparse
from esparse.errors import Mistake
from esparse.evaluate.perplexity import perplexity, window_losses
from esparse.models import activations, host_memory
from esparse.models.blocks import BlockModel
from esparse.models.forward_check import check
from tests.models.families import tiny

IDS_WL = torch.randint(1, 96, (5, 16), generator=torch.Generator().manual_seed(7))


def blocks_of(family: str, batch_tokens: int = 32, dtype: torch.dtype = torch.float32) -> BlockModel:
    return BlockModel(tiny(family).to(dtype), device=torch.device("cpu"), batch_tokens=batch_tokens)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_equals_the_formula(family: str) -> None:
    with torch.inference_mode():
        logits = tiny(family)(IDS_WL).logits.double().log_softmax(-1)
    total, count = 0.0, 0
    for window, row in zip(IDS_WL.tolist(), logits, strict=True):
        for place in range(1, len(window)):
            total -= row[place - 1, window[place]].item()
            count += 1
    got = perplexity(window_losses(blocks_of(family), IDS_WL))
    assert got == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 48, 10**6])
def test_does_not_depend_on_micro_batches(batch_tokens: int) -> None:
    usual = window_losses(blocks_of("llama"), IDS_WL)
    torch.testing.assert_close(window_losses(blocks_of("llama", batch_tokens), IDS_WL), usual, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "opt-post-norm", "mixtral"])
@pytest.mark.parametrize("batch_tokens", [16, 64])
def test_no_part_of_the_logits_is_larger_than_said_and_the_losses_stay(
    family: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = window_losses(blocks_of(family, batch_tokens), IDS_WL)
    blocks = blocks_of(family, batch_tokens)
    check(blocks, IDS_WL)
    assert blocks.logits_by_token
    most, made = 5 * 4 * 96, []  # 16 and 5 tokens at once, of one and of four windows
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", most)
    blocks.model.get_output_embeddings().register_forward_hook(lambda _, args, out: made.append(tuple(out.shape)))
    returned = []
    monkeypatch.setattr(host_memory, "trim", lambda: returned.append(len(made)))
    torch.testing.assert_close(window_losses(blocks, IDS_WL), whole, rtol=1e-6, atol=0)
    assert returned == [*range(1, len(made) + 1)], "memory is returned between a part and the next one"
    assert {shape[1] for shape in made} == ({16} if batch_tokens == 16 else {5, 1, 16})
    assert max(math.prod(shape) for shape in made) <= most


def test_logits_that_depend_on_other_tokens_are_made_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")

    class Mixing(torch.nn.Module):
        """A last norm that adds what stands before a token: causal, and no matter of the token alone."""

        def forward(self, x_BLH: torch.Tensor) -> torch.Tensor:
            return x_BLH + x_BLH.cumsum(1)

    model.model.norm = Mixing()
    with torch.inference_mode():
        log_p = model(IDS_WL).logits.double().log_softmax(-1)
    expected = -log_p[:, :-1].gather(-1, IDS_WL[:, 1:, None]).squeeze(-1).mean(1)
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", 96)
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=64)
    torch.testing.assert_close(window_losses(blocks, IDS_WL), expected, rtol=1e-5, atol=0)
    assert blocks.checked and not blocks.logits_by_token


def test_the_loss_is_computed_in_float32() -> None:
    blocks = blocks_of("llama", dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = blocks.model(IDS_WL).logits.float().log_softmax(-1)
    expected = -logits[:, :-1].gather(-1, IDS_WL[:, 1:, None]).squeeze(-1).double().mean(1)
    torch.testing.assert_close(window_losses(blocks, IDS_WL), expected, rtol=1e-4, atol=0)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = tiny("llama")
    model.lm_head.weight.data.zero_()
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=64)
    assert perplexity(window_losses(blocks, IDS_WL)) == pytest.approx(96)


WEIGHTS = ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_damaged_weight_is_named_wherever_it_is(name: str) -> None:
    model = tiny("llama")
    model.get_parameter(name).data.view(-1)[-40:] = float("nan")  # of the last token at least, in the embedding
    ids_WL = IDS_WL.clone()
    ids_WL[0, 0] = len(model.model.embed_tokens.weight) - 1
    said = rf"^{re.escape(name)} holds \d+ weights that are NaN or Inf: the checkpoint is damaged$"
    with pytest.raises(Mistake, match=said):
        window_losses(BlockModel(model, device=torch.device("cpu"), batch_tokens=64), ids_WL)
    with pytest.raises(Mistake, match=said):
        esparse.perplexity(model, None, ids_WL)


@pytest.mark.parametrize("of", ["layers.1 holds", "logits hold"])
def test_what_overflows_in_float16_is_told_with_the_way_out(of: str) -> None:
    model = tiny("llama").half()
    if of == "logits hold":
        model.lm_head.weight.data.fill_(6e4)
    else:
        model.model.layers[1].mlp.up_proj.weight.data *= 1e4
        model.model.layers[1].mlp.down_proj.weight.data *= 1e4
    model.model.norm.weight.data.fill_(10.0)
    with pytest.raises(Mistake, match=rf"{of} NaN or Inf: float16 overflows at 65,504, so set model.dtype=bfloat16"):
        window_losses(BlockModel(model, device=torch.device("cpu"), batch_tokens=64), IDS_WL)
