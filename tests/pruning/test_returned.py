"""Parts of a user's own that return what they should not: one sentence that names the part and the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import esparse
from esparse.cli.messages import sentence
from esparse.errors import Mistake
from esparse.metrics import Metric
from esparse.recoveries import Recovery
from esparse.shuffles import Shuffle
from esparse.updates import Solution, Update

TOKENS_SL = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(3))
FIRST = "model.layers.0.self_attn.q_proj"


def mine(base: type, **methods: Callable[..., Any]) -> Any:
    """A part of a user's own with these methods, which are not given `self`."""
    static = {name: staticmethod(does) for name, does in methods.items()}
    return dataclass(kw_only=True)(type("Mine", (base,), {"__annotations__": {}, **static}))()


def prune(**parts: Any) -> esparse.Report:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    return esparse.prune(
        LlamaForCausalLM(config), None, **{"metric": "wanda", "calibration": TOKENS_SL, "progress": False, **parts}
    )


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda w, stats: None, f"the scores that Mine gives {FIRST} must be a tensor of shape [32, 32], got NoneType"),
        (lambda w, stats: w.abs().numpy(), "got ndarray"),
        (lambda w, stats: w.abs().sum(0), "must be of shape [32, 32], got [32]"),
        (lambda w, stats: w.abs().sum(0, keepdim=True), "must be of shape [32, 32], got [1, 32]"),
        (lambda w, stats: w.to("meta"), "must be real numbers on cpu, got torch.float32 on meta"),
        (lambda w, stats: w.to(torch.complex64), "got torch.complex64"),
        (lambda w, stats: w.abs_(), f"Mine changes the dense weights of {FIRST} in place"),
        (lambda w, stats: w / 0, f"the scores that Mine gives {FIRST} hold NaN or Inf"),
    ],
)
def test_scores_that_are_none(score: Callable[..., Any], words: str) -> None:
    with pytest.raises(Mistake) as raised:
        prune(metric=mine(Metric, score=score))
    assert words in str(raised.value)


def test_scores_of_any_real_kind_are_scores() -> None:
    kinds: list[Callable[..., Any]] = [
        lambda w, stats: -w.abs(),
        lambda w, stats: w.abs().half(),
        lambda w, stats: (w.abs() * 1000).long(),
        lambda w, stats: w > 0,
        lambda w, stats: w.abs().requires_grad_(),
    ]
    for score in kinds:
        assert prune(metric=mine(Metric, score=score)).to_dict()["sparsity"]["density"] == 0.5


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (lambda scores, *_: list(range(32)), f"the order that Mine gives {FIRST} must be a tensor or None, got list"),
        (lambda scores, *_: torch.arange(32.0), "must be 32 integers, got torch.float32 of shape [32]"),
        (lambda scores, *_: torch.arange(4), "must be 32 integers, got torch.int64 of shape [4]"),
        (lambda scores, *_: torch.zeros(32).long(), "must name each of its 32 channels once"),
    ],
)
def test_orders_that_are_none(order: Callable[..., Any], words: str) -> None:
    with pytest.raises(Mistake) as raised:
        prune(shuffle=mine(Shuffle, order=order))
    assert words in str(raised.value)


@pytest.mark.parametrize(("group", "base", "method"), [("update", Update, "apply"), ("recovery", Recovery, "layer")])
@pytest.mark.parametrize(
    ("solve", "words"),
    [
        (lambda layer, start: None, f"what Mine gives {FIRST} must be a Solution, got NoneType"),
        (lambda layer, start: Solution(start.weight_OI[:3], start.keep_OI), "must be of shape [32, 32], got [3, 32]"),
        (lambda layer, start: Solution(start.weight_OI, start.keep_OI.float()), "must be of bool"),
        (lambda layer, start: Solution(start.weight_OI / 0, start.keep_OI), "hold NaN or Inf"),
        (lambda layer, start: Solution(layer.dense_OI.zero_(), start.keep_OI), "changes the dense weights"),
        (
            lambda layer, start: Solution(start.weight_OI, start.keep_OI, torch.ones(3)),
            "must be of shape [32], got [3]",
        ),
    ],
)
def test_solutions_that_are_none(solve: Callable[..., Any], words: str, group: str, base: type, method: str) -> None:
    with pytest.raises(Mistake) as raised:
        prune(**{group: mine(base, **{method: solve})})
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"begin": lambda block: None}, "Mine.begin must return a function of the block's masks, got None"),
        (
            {"begin": lambda block: lambda keeps: None},
            "Mine must return a list of RecoveryReport, or an empty one, got",
        ),
        ({"whole": lambda pruned: ["x"]}, "Mine must return a list of RecoveryReport"),
        ({"collects": lambda: {"norm": "ColumnNorm"}}, "Mine.collects must return statistics by name"),
    ],
)
def test_recoveries_that_return_something_else(methods: dict[str, Callable[..., Any]], words: str) -> None:
    with pytest.raises(Mistake) as raised:
        prune(recovery=mine(Recovery, **methods))
    assert words in str(raised.value)


def test_an_error_inside_a_part_says_in_which_and_where() -> None:
    def fails(*given: Any) -> None:
        raise KeyError("norm")

    for group, base, method in [
        ("metric", Metric, "score"),
        ("shuffle", Shuffle, "order"),
        ("update", Update, "apply"),
        ("recovery", Recovery, "layer"),
    ]:
        with pytest.raises(KeyError) as raised:
            prune(**{group: mine(base, **{method: fails})})
        assert raised.value.__notes__ == [f"in Mine at {FIRST}"]
        assert sentence(raised.value) == f"'norm', in Mine at {FIRST}"
