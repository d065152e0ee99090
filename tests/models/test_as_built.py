"""What a checkpoint of a model in memory would not have is said when it is pruned, and refused when it is saved."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

import esparse
from esparse.api.refusals import as_found
from esparse.models.as_built import difference
from esparse.models.skeleton import empty_weights
from tests.models.families import FAMILIES, MORE, tiny

TOKENS_SL = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The warnings so far."""
    logger = logging.getLogger("esparse")
    logger.addHandler(caplog.handler)
    yield lambda: list(dict.fromkeys(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING))
    logger.removeHandler(caplog.handler)


def found(model: PreTrainedModel) -> str:
    with as_found(model):
        return str(difference(model, TOKENS_SL))


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def forward_replaced(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: 3 * own(x)


def hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 3 * out)


def pre_hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (3 * args[0],))


def hook_of_the_model(model: PreTrainedModel) -> None:
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.roll(1, -1))


def other_class(model: PreTrainedModel) -> None:
    old = model.model.layers[1].mlp.up_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.model.layers[1].mlp.up_proj = new


def attribute(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 5.0


def buffer(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.01)


def configuration(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps = 10.0


CHANGES = [
    (forward_replaced, "model.layers.1.mlp has a forward that was replaced"),
    (hook, "model.layers.1.mlp has a forward hook"),
    (pre_hook, "model.layers.1.mlp has a forward pre-hook"),
    (hook_of_the_model, "model.embed_tokens has a forward hook"),
    (other_class, "model.layers.1.mlp.up_proj is a Doubled in place of a Linear"),
    (attribute, "attributes or buffers of its modules were changed"),
    (buffer, "model.rotary_emb.inv_freq holds other values"),
    (configuration, "attributes or buffers of its modules were changed"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_that_a_checkpoint_would_not_be_is_told_and_not_saved(
    change: Callable[[PreTrainedModel], None], words: str, said: Callable[[], list[str]], tmp_path: Path
) -> None:
    model = tiny("llama")
    change(model)
    report = esparse.prune(model, None, "2:4", metric="wanda", calibration=TOKENS_SL)
    (warning,) = said()
    assert words in warning and "\n" not in warning
    with pytest.raises(ValueError, match=f"a checkpoint would be another model than this one: {words}") as caught:
        esparse.save(model, None, report, tmp_path / "out", packed=change is hook)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_buffer_that_was_cast_with_the_model_is_told_with_what_to_do() -> None:
    model = tiny("llama")
    model.model.rotary_emb.to(torch.bfloat16)  # as model.to(torch.bfloat16) does beside the weights
    words = "model.rotary_emb.inv_freq was cast to bfloat16 (from_pretrained with dtype=bfloat16 leaves it as it is)"
    assert found(model).startswith(words)


def test_a_hook_of_all_modules_is_seen_too(said: Callable[[], list[str]]) -> None:
    def double(module: nn.Module, args: Any, out: Any) -> Any:
        return 2 * out if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert found(tiny("llama")).startswith("1 hooks of all modules (logits differ by")
    finally:
        handle.remove()
    assert found(tiny("llama")) == "None"


def test_a_class_whose_forward_was_replaced_is_named(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]], tmp_path: Path
) -> None:
    own = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 3 * own(self, x))
    model = tiny("llama")
    report = esparse.prune(model, None, "2:4", metric="wanda", calibration=TOKENS_SL)
    esparse.save(model, None, report, tmp_path / "out")
    assert len(said()) == 2
    assert all(f"LlamaMLP.forward was replaced by one from {__file__}" in warning for warning in said())


def test_a_small_difference_is_a_warning(said: Callable[[], list[str]], tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * (1 + 1e-3))
    report = esparse.prune(model, None, "2:4", metric="wanda", calibration=TOKENS_SL)
    esparse.save(model, None, report, tmp_path / "out")
    assert [warning.partition(":")[0] for warning in said()] == [
        "the model is not what transformers builds from its configuration",
        "a checkpoint of the model is without this",
    ]


@pytest.mark.slow
def test_what_changes_nothing_is_no_warning(said: Callable[[], list[str]], tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x)
    model.enable_input_require_grads()
    model.compile(backend="eager")
    report = esparse.prune(model, None, "2:4", metric="wanda", calibration=TOKENS_SL, recovery="variance")
    esparse.save(model, None, report, tmp_path / "out", packed=True)
    assert not said()
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(TOKENS_SL).logits, model.eval()(TOKENS_SL).logits)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_is_as_it_is_built(family: str) -> None:
    assert found(tiny(family)) == "None"


def test_a_packed_layer_does_not_take_the_place_of_one_with_a_forward_of_its_own() -> None:
    model = tiny("llama")
    layers = model.model.layers[0].mlp, model.model.layers[1].mlp
    own = layers[0].up_proj.forward
    layers[0].up_proj.forward = lambda x: 2 * own(x)
    other_class(model)
    report = esparse.prune(model, None, "2:4", metric="wanda", calibration=TOKENS_SL)
    with torch.no_grad():
        before = model(TOKENS_SL).logits
        left = esparse.pack(model, report)
        torch.testing.assert_close(model(TOKENS_SL).logits, before)
    assert sorted(left) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert all("a forward of its own" in why for why in left.values())


def test_other_threads_build_their_models_in_memory() -> None:
    made: list[nn.Module] = []
    with empty_weights():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        here = nn.Linear(2, 2)
    assert here.weight.is_meta
    assert not made[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_two_threads_that_compare_leave_nothing_behind() -> None:
    models = [tiny("llama") for _ in range(2)]
    start = threading.Barrier(2, timeout=5)

    def compare(model: PreTrainedModel) -> None:
        start.wait()
        for _ in range(3):
            assert difference(model, TOKENS_SL) is None

    before = nn.Module.register_parameter
    threads = [threading.Thread(target=compare, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.register_parameter is before
    assert not nn.Linear(2, 2).weight.is_meta
