"""Losses by a model's own forward, against the formula on all of its logits at once."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esparse.evaluate import whole_model
from esparse.models import activations
from tests.models.families import tiny

IDS_WL = torch.randint(1, 96, (5, 16), generator=torch.Generator().manual_seed(7))


def by_the_formula(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        log_p = model(IDS_WL).logits.double().log_softmax(-1)
    return -log_p[:, :-1].gather(-1, IDS_WL[:, 1:, None]).squeeze(-1).mean(1)


def outputs_of_the_head(model: Any) -> list[tuple[int, ...]]:
    made: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: made.append(tuple(out.shape)))
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral", "opt-post-norm"])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_no_part_of_the_logits_is_larger_than_said_and_the_losses_stay(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    expected, made = by_the_formula(model), outputs_of_the_head(model)
    most = 10 * 96  # ten tokens of one window, five each of two, two each of five
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", most)
    found = whole_model.losses(model, IDS_WL, at_once)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert max(math.prod(shape) for shape in made) <= most
    assert any(shape[1] > 1 for shape in made)


@pytest.mark.parametrize("family", ["gemma2", "cohere2", "granite-hybrid"])
def test_what_comes_behind_the_head_counts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap or a factor: then the logits are the model's, of a window at once."""
    model = tiny(family)
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", 96)
    torch.testing.assert_close(whole_model.losses(model, IDS_WL, 2), by_the_formula(model), rtol=1e-5, atol=0)


def test_a_model_without_such_a_head_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    expected = by_the_formula(model)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    torch.testing.assert_close(whole_model.losses(model, IDS_WL, 2), expected, rtol=1e-5, atol=0)


def test_a_head_that_is_called_by_keyword_is_taken_as_it_is() -> None:
    model = tiny("llama")
    expected, own = by_the_formula(model), model.lm_head.forward
    model.lm_head.__class__ = type("Keyword", (torch.nn.Linear,), {"forward": lambda self, hidden: own(hidden)})
    call, head = model.forward, model.lm_head
    model.forward = lambda **asked: SimpleNamespace(
        logits=head(hidden=model.model(input_ids=asked["input_ids"], use_cache=False).last_hidden_state)
    )
    torch.testing.assert_close(whole_model.losses(model, IDS_WL, 2), expected, rtol=1e-5, atol=0)
    model.forward = call


def test_hooks_are_gone_also_after_an_exception() -> None:
    model = tiny("llama")
    model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole_model.losses(model, IDS_WL, 2)
    assert not model.get_output_embeddings()._forward_pre_hooks
