"""Runs of one process share the loading of their model, and end as if each had been alone."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from safetensors.torch import load_file, save_file
from torch import Tensor

from esparse.cli import registry
from esparse.models import cache, host_memory, load
from esparse.run import experiment, loading
from esparse.run.measure import dense_known
from tests.composing import composing
from tests.models.families import FAMILIES, tiny
from tests.workshop import furnished, small_run

# What changes a model most: folds, biases it did not have, values of all survivors, orders that are made physical.
CHANGES = {
    "folds and biases": ["prepare=equalise", "recovery=bias", "pattern=8:16", "export=packed"],
    "values": ["update=obs", "recovery=window", "recovery.epochs=1", "recovery.train=all", "profile=true"],
    "whole model": ["metric=gradient", "recovery=distill", "recovery.epochs=1", "recovery.all_parameters=true"],
}


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    dense_known.clear()
    cache._kept.clear()
    yield
    cache._kept.clear()


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    return furnished(tmp_path, blocks=2)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were read from their files."""
    read, original = [], load._loaded

    def counted(model: load.Model, *rest: Any) -> Any:
        read.append(model.path)
        return original(model, *rest)

    monkeypatch.setattr(load, "_loaded", counted)
    return read


def carry_out(workshop: Path, out: Path, *overrides: str, again: bool = False) -> dict[str, bytes]:
    """The bytes of what a run leaves, by file."""
    with composing():
        words = [*small_run(workshop, out), "model.store=memory", *overrides]
        config = compose("config", words, return_hydra_config=True)
    asked = registry.build(config)
    settings = registry.resolved(config, asked, config.hydra.runtime.choices)
    out.mkdir()
    experiment.run(asked, run_id=out.name, name="a run", config=settings, folder=out, again=again)
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.safetensors"))}


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    every = dict(model.named_parameters(remove_duplicate=False))
    return every | dict(model.named_buffers(remove_duplicate=False))


def ties(named: dict[str, Tensor]) -> dict[str, str]:
    """For each name the first one of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_same_model_with_memory_of_its_own(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(1, 96, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        copy = cache.copied(model)
        assert torch.equal(copy(input_ids=ids).logits, before)
    old, new = tensors(model), tensors(copy)
    assert old.keys() == new.keys() and type(copy) is type(model) and not copy.training
    assert repr(copy) == repr(model) and copy.config.to_dict() == model.config.to_dict()
    places = {t.untyped_storage().data_ptr() for t in old.values() if t.numel()}
    for name, value in old.items():
        assert new[name].data_ptr() % 64 == value.data_ptr() % 64, name
        assert new[name].requires_grad == value.requires_grad and new[name].stride() == value.stride()
        assert new[name].untyped_storage().data_ptr() not in places
    assert [[a is b for b in new.values()] for a in new.values()] == [
        [a is b for b in old.values()] for a in old.values()
    ]
    for value in new.values():
        value.data.zero_()
    copy.config.update({"num_hidden_layers": 1})
    copy.register_forward_hook(lambda *_: 1 / 0)
    copy.get_submodule("").half()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_copy_begins_at_the_same_place_of_a_cache_line() -> None:
    """As a file's tensors do, which are mapped into memory."""
    memory = torch.arange(400.0)
    for start in (0, 1, 2, 5, 15):
        x = memory[start : start + 100].view(5, 20)
        copy = cache._copy(x)
        assert torch.equal(copy, x) and copy.data_ptr() % 64 == x.data_ptr() % 64
    assert torch.equal(cache._copy(memory.view(20, 20).T), memory.view(20, 20).T)
    assert cache._copy(torch.tensor(3)) == 3 and cache._copy(torch.zeros(0)).shape == (0,)


@pytest.mark.tries(1)
@pytest.mark.parametrize("first", CHANGES)
def test_a_run_behind_another_ends_as_if_it_were_alone(
    first: str, workshop: Path, tmp_path: Path, loads: list[str]
) -> None:
    asked = ["update=obs", "export=dense", "shuffle.foldable=true", "profile=true"]
    alone = carry_out(workshop, tmp_path / "alone", *asked)
    assert len(loads) == 1 and not cache._kept
    carry_out(workshop, tmp_path / "first", *CHANGES[first], again=True)
    dense_known.clear()  # measured anew, on the copy
    assert carry_out(workshop, tmp_path / "second", *asked, again=True) == alone
    dense_known.clear()
    assert carry_out(workshop, tmp_path / "last", *asked) == alone
    assert len(loads) == 2 and not cache._kept  # the last one got what was kept


@pytest.mark.slow
def test_half_precision_and_tied_weights(workshop: Path, tmp_path: Path, loads: list[str]) -> None:
    model = load.load(_model(workshop), tmp_path)[0]
    model.config.tie_word_embeddings = True
    model.tie_weights()
    for file in (workshop / "model").glob("*.safetensors*"):
        file.unlink()
    model.to(torch.bfloat16).save_pretrained(workshop / "model")
    asked = ["metric=wanda", "export=dense", "shuffle=none"]
    alone = carry_out(workshop, tmp_path / "alone", *asked)
    carry_out(workshop, tmp_path / "first", "recovery=variance", again=True)
    dense_known.clear()
    assert carry_out(workshop, tmp_path / "second", *asked) == alone
    assert len(loads) == 3


def _model(workshop: Path) -> load.Model:
    with composing():
        return registry.build(compose("config", small_run(workshop, workshop / "out"))).model


def _change_a_weight(workshop: Path) -> None:
    file = sorted((workshop / "model").glob("*.safetensors"))[0]
    weights = load_file(file)
    next(iter(weights.values())).mul_(1.5)
    save_file(weights, file, metadata={"format": "pt"})


def _change_the_configuration(workshop: Path) -> None:
    file = workshop / "model" / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-01'))


@pytest.mark.tries(1)
@pytest.mark.parametrize("change", [_change_a_weight, _change_the_configuration])
def test_a_checkpoint_that_changes_is_loaded_and_measured_anew(
    change: Any, workshop: Path, tmp_path: Path, loads: list[str]
) -> None:
    before = carry_out(workshop, tmp_path / "before", again=True)
    change(workshop)
    after = carry_out(workshop, tmp_path / "after", again=True)
    assert len(loads) == 2
    assert after["window_losses.safetensors"] != before["window_losses.safetensors"]
    cache._kept.clear()
    dense_known.clear()
    assert carry_out(workshop, tmp_path / "alone") == after


@pytest.mark.slow
def test_another_model_takes_the_place(workshop: Path, tmp_path: Path, loads: list[str]) -> None:
    shutil.copytree(workshop / "model", workshop / "other")
    for name, path in (("a", "model"), ("b", "other"), ("c", "model")):
        carry_out(workshop, tmp_path / name, f"model.path={workshop / path}", again=True)
        assert len(cache._kept) == 1
    assert len(loads) == 3


@pytest.mark.slow
def test_with_too_little_memory_it_is_loaded_anew(
    workshop: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = sum(t.nbytes for t in tensors(load.load(_model(workshop), tmp_path)[0]).values())
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: 3 * size - 1)
    monkeypatch.setattr(logging.getLogger("esparse"), "propagate", True)
    with caplog.at_level(logging.DEBUG, "esparse"):
        for name in ("a", "b"):
            carry_out(workshop, tmp_path / name, again=True)
            assert not cache._kept
        assert len(loads) == 3 and "as it was loaded" not in caplog.text
        monkeypatch.setattr(host_memory, "free_host_bytes", lambda: 3 * size)
        for name in ("c", "d"):
            carry_out(workshop, tmp_path / name, again=True)
        assert len(loads) == 4 and "as it was loaded" in caplog.text


def test_what_is_not_made_of_ordinary_parts_is_not_kept() -> None:
    class Own(torch.nn.Linear):
        pass

    model = tiny("llama")
    assert cache._is_plain(model)
    model.lm_head = Own(32, 96)
    assert not cache._is_plain(model)
    assert cache.keep("x", (model, None)) == (model, None) and not cache._kept


def test_a_run_leaves_no_model_behind(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one's stands beside the one that is kept, not beside two."""
    models, original = [], load.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        models.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(loading, "load", watched)
    gc.collect()
    gc.disable()
    try:
        carry_out(workshop, tmp_path / "a", "update=obs", again=True)
        assert [model() for model in models] == [None]
    finally:
        gc.enable()
