"""esparse.pack and esparse.save: the model without its zeros computes what it did, in memory and from disk."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import esparse
from esparse.packed.experts import PackedExperts
from esparse.packed.layer import PackedLinear
from esparse.packed.quantised_layer import QuantisedLinear
from tests.models.families import tiny
from tests.models.test_forward_check import families

TOKENS_SL = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(3))
HOW = [
    ("llama", {"shuffle": None}),
    ("llama", {"shuffle": "esparse"}),
    ("llama-eager-bias", {"shuffle": "gns", "recovery": "bias"}),
    ("llama", {"shuffle": "gns", "pattern": "4:8", "outliers": "4:16"}),
    ("gpt2", {"shuffle": "esparse"}),
    ("mixtral", {"shuffle": "gns"}),
    ("gpt-oss", {"shuffle": None, "pattern": "2:8"}),
]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS_SL).logits


@pytest.mark.parametrize(("family", "how"), HOW, ids=str)
def test_a_packed_model_computes_what_it_did(family: str, how: dict) -> None:
    model = tiny(family).train()
    if "moe" in family or family in ("mixtral", "gpt-oss"):
        model.set_experts_implementation("grouped_mm")
    report = esparse.prune(model, None, calibration=TOKENS_SL, **how)
    seen: list[int] = []
    of_layer = next(n for n, m in model.named_modules() if f"{n}.weight" in report.keeps)
    model.get_submodule(of_layer).register_forward_hook(lambda *_: seen.append(1))
    dense, dense_bytes = logits(model), sum(p.nbytes for p in model.parameters())
    assert seen
    model.train()
    assert esparse.pack(model, report) == {}
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    stacks = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert len(layers) + len(stacks) == len(report.keeps)
    assert all(m.training for m in (*layers, *stacks))
    seen.clear()
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-5)
    assert seen
    assert sum(p.nbytes for p in (*model.parameters(), *model.buffers())) < dense_bytes
    for again in (lambda: esparse.pack(model, report), lambda: esparse.prune(model, None, calibration=TOKENS_SL)):
        with pytest.raises(ValueError, match="packed already"):
            again()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_saved_model_is_loaded_as_it_was(family: str, packed: bool, tmp_path: Path) -> None:
    model = tiny(family).train()
    shuffle = "esparse" if packed else "none"  # an ordinary checkpoint has no place for its orders
    report = esparse.prune(model, None, calibration=TOKENS_SL, shuffle=shuffle)
    written = esparse.save(model, None, report, tmp_path / "model", packed=packed)
    assert model.training
    assert written["bytes"] == sum(
        f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little")
        for f in (tmp_path / "model").glob("*.safetensors")
    )
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(part in card for part in ("metric=sparsegpt", f"shuffle={shuffle}", "update=sparsegpt", "pattern 2:4"))
    assert "4 sequences of tokens" in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", experts_implementation="eager")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    if packed:
        with pytest.raises(ValueError, match="packed by esparse"):
            esparse.prune(again, None, calibration=TOKENS_SL)
    else:
        assert esparse.pack(again, report) == {}  # the report is of these weights
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("foldable", [True, False])
def test_a_dense_checkpoint_after_a_shuffle_takes_one_of_the_ways_that_the_page_names(
    foldable: bool, tmp_path: Path
) -> None:
    model = tiny("llama")
    shuffle = esparse.option("shuffle", "esparse", foldable=foldable)
    report = esparse.prune(model, None, calibration=TOKENS_SL, shuffle=shuffle)
    written = esparse.save(model, None, report, tmp_path / "model", **({} if foldable else {"order": "original"}))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    assert written["holds_in"] == (written["of_layers"] if foldable else 0)


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("", "folder must name a folder, got ''"),
        (None, "folder must name a folder, got None"),
        (3, "folder must name a folder, got 3"),
        (".", "export.path=. is the folder of this process"),
        (Path(), "export.path=. is the folder of this process"),
        ("file", "export.path=file is there already"),
        ("file/model", "file is no folder"),
    ],
    ids=str,
)
def test_a_folder_that_is_none_is_refused_in_a_sentence(
    folder: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    report = esparse.prune(model, None, calibration=TOKENS_SL, shuffle=None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if str(folder).startswith("file"):
        Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        esparse.save(model, None, report, folder)
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before


def test_biases_of_a_recovery_that_an_ordinary_checkpoint_would_lose_are_refused(tmp_path: Path) -> None:
    """After the pruning the layers have them: what counts is whether transformers builds the layers with them."""
    model = tiny("llama")
    report = esparse.prune(model, None, calibration=TOKENS_SL, shuffle=None, recovery="bias")
    assert model.model.layers[0].mlp.up_proj.bias is not None
    with pytest.raises(ValueError, match=r"q_proj, \.\.\.\), and an ordinary checkpoint of Llama.*use export=packed"):
        esparse.save(model, None, report, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    esparse.save(model, None, report, tmp_path / "model", packed=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["dbrx", "llama4_text"])
def test_experts_that_a_model_takes_all_at_once_stay_dense_with_a_reason(family: str) -> None:
    model = families.build(family)
    report = esparse.prune(model, None, calibration=TOKENS_SL, shuffle=None)
    expected = logits(model)
    left = esparse.pack(model, report)
    assert set(left) == {name for name in report.keeps if "experts" in name}
    assert all("takes all of a parameter at once" in why for why in left.values())
    assert all((layer.packed_bytes is None) == ("experts" in layer.name) for layer in report.layers)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["physical", "original"])
def test_layers_that_a_model_calls_by_keyword_are_packed(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(input=self.act_fn(self.gate_proj(input=x)) * self.up_proj(input=x))
        return down

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    model = tiny("llama")
    report = esparse.prune(model, None, calibration=TOKENS_SL)
    expected = logits(model)
    esparse.save(model, None, report, tmp_path / "model", packed=True, order=order)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    esparse.pack(model, report)
    for packed in (model, again):
        torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-5)


GRIDS = [
    ("llama", {"shuffle": "esparse", "quantise": "int4"}),
    ("llama", {"shuffle": None, "pattern": "dense", "quantise": "int8"}),
    ("llama", {"shuffle": "gns", "pattern": "4:8", "outliers": "1:16", "quantise": "nf4"}),
    ("gpt2", {"shuffle": "esparse", "quantise": "int3"}),
    ("mixtral", {"shuffle": "gns", "quantise": "fp8"}),
    ("mixtral", {"shuffle": None, "pattern": "dense", "quantise": "int4"}),
]


@pytest.mark.parametrize(("family", "how"), GRIDS, ids=str)
@pytest.mark.tries(3)
def test_a_quantised_model_computes_from_codes(family: str, how: dict, tmp_path: Path) -> None:
    """In memory and from disk, layers and experts, with a pattern and without."""
    grid = esparse.option("quantise", how["quantise"], group=8, rounding="nearest")
    model = tiny(family).eval()
    report = esparse.prune(model, None, calibration=TOKENS_SL, **how | {"quantise": grid})
    expected = logits(model)
    esparse.save(model, None, report, tmp_path / "model", packed=True)
    entry = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert entry["grid"]["class"] == type(grid).__name__
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert esparse.pack(model, report) == {}
    for packed in (model, again.to("cpu")):
        layers = [m for m in packed.modules() if isinstance(m, QuantisedLinear)]
        stacks = [m for m in packed.modules() if isinstance(m, PackedExperts)]
        assert len(layers) + len(stacks) == len(report.keeps)
        assert all("codes" in m._buffers and "values" not in dict(m.named_parameters()) for m in (*layers, *stacks))
        held = {name: value for m in (*layers, *stacks) for name, value in m.state_dict(prefix=f"{id(m)}.").items()}
        bytes_of_codes = sum(value.nbytes for name, value in held.items() if not name.endswith(("order", "bias")))
        assert sum(layer.packed_bytes or 0 for layer in report.layers) == bytes_of_codes
        assert all(m.weight.dtype == torch.float32 for m in layers)
        torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_packed_model_is_not_saved_but_copied_pickled_and_generated_from(family: str, tmp_path: Path) -> None:
    """save_pretrained wrote a checkpoint that was loaded with random weights."""
    model = tiny(family).eval()
    report = esparse.prune(model, None, calibration=TOKENS_SL)
    esparse.pack(model, report)
    expected = logits(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"cannot be saved again: .* before esparse\.pack, by esparse\.save"):
            other.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(other), expected)
        assert other.generate(input_ids=TOKENS_SL[:1], max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 16
    assert not list(tmp_path.glob("again/*"))
    assert "quantization_config" not in model.config.to_dict()
    with pytest.raises(ValueError, match="packed already"):
        esparse.save(model, None, report, tmp_path / "model", packed=True)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_report_is_pickled_and_copied(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    report = esparse.prune(model, None, calibration=TOKENS_SL)
    for number, other in enumerate((pickle.loads(pickle.dumps(report)), copy.deepcopy(report))):
        assert str(other) == str(report) and other.to_dict()["layers"] == report.to_dict()["layers"]
        esparse.save(model, None, other, tmp_path / str(number), packed=True)
    assert esparse.pack(model, other) == {}


def test_what_was_changed_since_it_was_rounded_is_refused() -> None:
    model = tiny("llama")
    report = esparse.prune(model, None, "dense", calibration=TOKENS_SL, shuffle=None, quantise="int8")
    next(model.get_parameter(name) for name in report.keeps).data *= 1.01
    with pytest.raises(ValueError, match=r"do not lie on the grid of 8 bits.*changed since it was pruned"):
        esparse.pack(model, report)


@pytest.mark.parametrize(
    "use", [esparse.pack, partial(esparse.save, tokenizer=None, folder="model")], ids=["pack", "save"]
)
def test_an_older_report_of_a_model_that_was_pruned_further_is_refused(
    use: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second masks lie inside the first ones, so that no weight of the older report has come back."""
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    older = esparse.prune(model, None, "4:8", metric="magnitude", calibration=TOKENS_SL)
    newer = esparse.prune(model, None, "2:8", metric="magnitude", calibration=TOKENS_SL)
    with pytest.raises(ValueError, match=r"nonzeros, and the model has [\d,]+ in .* a later report may fit"):
        use(model=model, report=older)
    assert not (tmp_path / "model").exists()
    use(model=model, report=newer)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    report = esparse.prune(model, None, "50%", calibration=TOKENS_SL, shuffle=None)
    with pytest.raises(ValueError, match="50% is none"):
        esparse.pack(model, report)
    with pytest.raises(ValueError, match="use export=dense"):
        esparse.save(model, None, report, tmp_path / "model", packed=True)
    report = esparse.prune(model, None, "2:4", metric="entropy", calibration=TOKENS_SL)
    with pytest.raises(ValueError, match="the report is of another model"):
        esparse.pack(tiny("gpt2"), report)
    with pytest.raises(ValueError, match=r"Use shuffle\.foldable=true"):
        esparse.save(model, None, report, tmp_path / "model")
    for use in (
        esparse.pack,
        lambda model, report: esparse.save(model, None, report, tmp_path / "model", order="original"),
    ):
        with pytest.raises(ValueError, match="q_proj has weights that were pruned according to the report"):
            use(tiny("llama"), report)  # the dense one
    assert not (tmp_path / "model").exists()
    report = esparse.prune(model, None, "dense", calibration=TOKENS_SL, shuffle=None)
    with pytest.raises(ValueError, match="dense is none"):
        esparse.pack(model, report)
    with pytest.raises(ValueError, match="nothing to pack at pattern=dense without quantise"):
        esparse.save(model, None, report, tmp_path / "model", packed=True)
