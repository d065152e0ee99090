"""Log-likelihoods against the formula on the model's own logits, one request at a time."""

from __future__ import annotations

import random

import pytest
import torch

from esparse.evaluate import likelihood
from esparse.evaluate.likelihood import log_likelihoods
from esparse.models.blocks import BlockModel
from esparse.models.forward_check import check
from tests.models.families import tiny


def requests(count: int = 30) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Inputs of 1 to 40 tokens with continuations of 1 to all of them; some share an input."""
    draw = random.Random(3)
    made = []
    for _ in range(count):
        whole = [draw.randrange(1, 96) for _ in range(draw.randrange(2, 42))]
        made.append((tuple(whole[:-1]), tuple(whole[-draw.randrange(1, len(whole)) :])))
    same = made[0][0]
    return [*made, (same, (5,)), (same, (6,)), made[1]]


def by_the_formula(family: str, request: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[float, bool]:
    inputs, continuation = request
    with torch.inference_mode():
        log_p = tiny(family)(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for back, token in enumerate(reversed(continuation)):
        row = log_p[len(inputs) - 1 - back]
        total += row[token].item()
        greedy &= int(row.argmax()) == token
    return total, greedy


def blocks_of(family: str, batch_tokens: int = 96) -> BlockModel:
    return BlockModel(tiny(family), device=torch.device("cpu"), batch_tokens=batch_tokens)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "opt", "mixtral"])
def test_equals_the_formula(family: str, by_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head that runs on the tokens alone whose logits are read, and with one that runs on all."""
    asked, blocks = requests(12), blocks_of(family)
    check(blocks, torch.randint(1, 96, (2, 12)))
    assert blocks.logits_by_token
    blocks.logits_by_token = by_token
    lengths, whole = set(), BlockModel.logits

    def logits(self: BlockModel, tokens_BL: torch.Tensor, *rest: object) -> torch.Tensor:
        lengths.add(tokens_BL.shape[1])
        return whole(self, tokens_BL, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockModel, "logits", logits)
    answers = log_likelihoods(blocks, asked)
    assert (lengths <= {16, 32, 48}) != by_token  # inputs are padded to these
    for got, request in zip(answers, asked, strict=True):
        expected = by_the_formula(family, request)
        assert got[0] == pytest.approx(expected[0], rel=1e-4) and got[1] == expected[1]


def test_greedy_is_what_the_model_would_write() -> None:
    inputs = (3, 1, 4, 1, 5)
    with torch.inference_mode():
        best = int(tiny("llama")(torch.tensor([inputs])).logits[0, -1].argmax())
    got = log_likelihoods(blocks_of("llama"), [(inputs, (best,)), (inputs, ((best + 1) % 96,))])
    assert [greedy for _, greedy in got] == [True, False]


@pytest.mark.parametrize(("batch_tokens", "tokens"), [(1, 10**6), (10**6, 10**6), (64, 1), (64, 100)])
def test_depends_neither_on_micro_batches_nor_on_room(
    monkeypatch: pytest.MonkeyPatch, batch_tokens: int, tokens: int
) -> None:
    asked = requests()
    usual = log_likelihoods(blocks_of("llama"), asked)
    monkeypatch.setattr(likelihood, "_room", lambda blocks: tokens)
    passes: list[int] = []
    other = log_likelihoods(blocks_of("llama", batch_tokens), asked, passes.append)
    assert [value for value, _ in other] == pytest.approx([value for value, _ in usual], rel=1e-5)
    assert [greedy for _, greedy in other] == [greedy for _, greedy in usual]
    inputs = {inputs for inputs, _ in asked}
    if tokens == 1:
        assert passes.count(0) == len(inputs)  # one pass for each of them, at least
    elif tokens == 100:
        assert 1 < passes.count(0) < len(inputs)
    else:
        assert passes.count(0) == 1


def test_equal_inputs_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, seen = blocks_of("llama"), []
    check(blocks, torch.arange(1, 17).view(2, 8))
    enter = blocks.enter
    monkeypatch.setattr(blocks, "enter", lambda tokens_BL: (seen.append(len(tokens_BL)), enter(tokens_BL))[1])
    log_likelihoods(blocks, [((1, 2, 3), (answer,)) for answer in range(50)])
    assert seen == [1]


def test_a_likelihood_that_is_not_finite_is_an_error() -> None:
    blocks = blocks_of("llama")
    blocks.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lm_head\.weight holds 1 weights that are NaN or Inf"):
        log_likelihoods(blocks, requests(2))
