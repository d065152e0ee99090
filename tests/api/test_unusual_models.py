"""Models in unusual states: each is pruned exactly, or refused in one sentence before anything is changed."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import esparse
from esparse.models.load import BUILTIN
from tests.models.families import SMALL, tiny

TOKENS_SL = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(3))
LLAMA = AutoConfig.for_model("llama", **SMALL)


def pruned(model: PreTrainedModel, **how: Any) -> esparse.Report:
    return esparse.prune(model, None, "2:4", **{"calibration": TOKENS_SL, "metric": "wanda"} | how)


def other_dtype(part: str) -> PreTrainedModel:
    model = tiny("llama").bfloat16()
    model.get_submodule(part).float()
    return model


def adapted() -> PreTrainedModel:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))  # changes the model inside
    return model


def tuples() -> PreTrainedModel:
    model = tiny("llama")
    model.config.return_dict = False
    return model


def expanded() -> PreTrainedModel:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data = torch.randn(1, 32).expand(48, 32)
    return model


def damaged(part: str) -> PreTrainedModel:
    model = tiny("llama")
    model.get_parameter(part).data[3] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: other_dtype("lm_head"), r"LlamaForCausalLM does not run on tokens by itself \(RuntimeError: .*dtype"),
        (lambda: other_dtype("model.layers.1.mlp.up_proj"), "does not run on tokens by itself"),
        (tuples, "does not run on tokens by itself"),
        (lambda: AutoModel.from_config(LLAMA), "AutoModelForCausalLM.*and a LlamaModel gives no logits"),
        (
            lambda: AutoModelForSequenceClassification.from_config(LLAMA).eval(),
            r"a LlamaForSequenceClassification gives logits of shape \[1, 2\] for tokens of shape \[1, 16\]",
        ),
        (lambda: damaged("model.norm.weight"), "model.norm.weight holds 1 weights that are NaN"),
    ],
)
def test_what_is_no_working_model_is_refused(make: Callable[[], PreTrainedModel], words: str) -> None:
    for call in (pruned, lambda model: esparse.perplexity(model, None, TOKENS_SL)):
        with pytest.raises(ValueError, match=words) as caught:
            call(make())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (adapted, r"model.layers.0.self_attn.q_proj has an adapter \(Linear\): merge it"),
        (expanded, "model.layers.0.mlp.up_proj.weight has one number in memory for several weights"),
    ],
)
def test_what_cannot_be_written_to_is_refused(make: Callable[[], PreTrainedModel], words: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        pruned(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_of_another_size_is_not_exported(tmp_path: Path) -> None:
    model = tiny("llama")
    model.lm_head = torch.nn.Linear(32, 50, bias=False)
    report = pruned(model)
    with pytest.raises(ValueError, match=r"lm_head.weight has the shape \[50, 32\].*with \[96, 32\]"):
        esparse.save(model, None, report, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_model_is_not_worked_on_by_two_calls_at_once() -> None:
    model, errors = tiny("llama"), []
    report = pruned(model)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(5)

    handle = model.model.layers[0].register_forward_hook(wait)
    first = threading.Thread(target=lambda: pruned(model))
    first.start()
    assert inside.wait(60)
    calls = (
        pruned,
        lambda model: esparse.perplexity(model, None, TOKENS_SL),
        lambda model: esparse.pack(model, report),
    )
    for call in calls:
        with pytest.raises(ValueError, match="another call of esparse works on this model") as caught:
            call(model)
        errors.append(caught)
    go_on.set()
    first.join()
    handle.remove()
    assert len(errors) == 3
    assert (model.model.layers[2].mlp.up_proj.weight == 0).float().mean() == 0.5
    assert pruned(model).density == 0.5  # and the model is free again


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.resize_token_embeddings(120),
        lambda model: setattr(model.config, "output_hidden_states", True),
        lambda model: model.requires_grad_(False),
        lambda model: setattr(model.generation_config, "temperature", 0.3),
        lambda model: model.double(),
    ],
    ids=["resized", "hidden states", "frozen", "generation settings", "float64"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_pruned_and_saved_is_what_is_loaded(
    change: Callable[[PreTrainedModel], Any], packed: bool, tmp_path: Path
) -> None:
    model = tiny("llama")
    change(model)
    esparse.save(model, None, pruned(model), tmp_path / "a b=c", packed=packed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a b=c", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS_SL).logits, model(TOKENS_SL).logits)


def test_a_model_that_became_nan_is_not_saved(tmp_path: Path) -> None:
    for part in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        model = tiny("llama")
        report = pruned(model)
        weight = model.get_parameter(part).data
        weight[weight != 0] = float("nan")
        with pytest.raises(ValueError, match=rf"{part} holds \d+ weights that are NaN"):
            esparse.save(model, None, report, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_callers_default_device_changes_nothing(tmp_path: Path) -> None:
    tokenizer, texts = AutoTokenizer.from_pretrained(BUILTIN), [f"{i} apples and {7 * i} pears" for i in range(200)]
    config = AutoConfig.for_model("llama", **SMALL | {"vocab_size": 1024})
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def numbers(model: PreTrainedModel) -> tuple[float, list[float], int]:
        report = esparse.prune(model, tokenizer, calibration=texts, sequences=4, length=16)
        saved = esparse.save(model, tokenizer, report, tmp_path / "out", packed=True)
        perplexity = esparse.perplexity(model, tokenizer, texts[::-1], length=16)
        return perplexity, [layer.kept_score for layer in report.layers], saved["bytes"]

    expected = numbers(models[0])
    with torch.device("meta"):  # as with torch.set_default_device("cuda"), nothing may be made there
        assert numbers(models[1]) == expected


class Processor:
    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BUILTIN)

    def __call__(self, text: str) -> Any:
        return self.tokenizer(text)


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [(Processor(), r"which has one: give its \.tokenizer"), (lambda text: [1, 2], "got <function <lambda>")],
    ids=["processor", "function"],
)
def test_what_is_no_tokenizer_is_refused(tokenizer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer must be a tokenizer of transformers.*{words}"):
        esparse.prune(tiny("llama"), tokenizer, calibration=["a text"])


def test_what_is_said_of_an_argument_is_one_line() -> None:
    class Lines:
        def __repr__(self) -> str:
            return "Dataset({\n    features\n})"

    with pytest.raises(ValueError, match=r"got Dataset\(\{ features \}\)"):
        esparse.prune(tiny("llama"), None, calibration=Lines())


def test_a_text_that_says_nothing_is_told_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | {"vocab_size": 1024}))

    def said(text: str) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "esparse"):
            esparse.prune(copy.deepcopy(model), tokenizer, metric="wanda", calibration=[text], sequences=16, length=16)
        return caplog.text

    assert "the calibration text has" in said("   \n\n  " * 500) and "different tokens among 256" in caplog.text
    assert not said(" ".join(f"{number} apples and {number * 7} pears," for number in range(300)))
    with pytest.raises(ValueError, match=r"the text the token .* again and again"):
        esparse.perplexity(model, tokenizer, ["\n" * 4000], length=32)
    words = WordLevel({"<unk>": 0, **{str(number): number for number in range(1, 96)}}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    known = [str(1 + number * number % 95) for number in range(900)]
    assert not said(" ".join(known))
    assert " % of the tokens of the calibration text are <unk>, which" in said(
        " x ".join(known[::2]).replace("x", "2 x")
    )
