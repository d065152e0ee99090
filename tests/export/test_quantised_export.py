"""A quantised model that is exported packed: files at the size that is counted, and the same values when loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import esparse
from esparse.export.writer import INDEX
from esparse.packed.grid_sizes import file_bytes
from esparse.packed.quantised_layer import QuantisedLinear
from esparse.quantise.grids import settings
from tests.export.test_export import GONE, as_older
from tests.models.families import tiny

TOKENS_SL = torch.randint(1, 96, (6, 20), generator=torch.Generator().manual_seed(5))


def exported(folder: Path, family: str, quantise: str, order: str, **changes: Any) -> torch.nn.Module:
    """The pruned model, of which a packed checkpoint lies in the folder."""
    model = tiny(family)
    parts = {"quantise": esparse.option("quantise", quantise, group=16, **changes), "update": "sparsegpt"}
    report = esparse.prune(model, None, "2:4", calibration=TOKENS_SL, shuffle="esparse", progress=False, **parts)
    esparse.save(model, None, report, folder, packed=True, order=order)
    return model


@pytest.mark.parametrize("order", ["physical", "original"])
@pytest.mark.parametrize(
    ("family", "quantise", "changes"),
    [
        ("llama", "int4", {}),
        ("llama", "int3", {"symmetric": False}),
        ("gpt2", "nf4", {"scale": "bfloat16"}),
        ("opt", "fp8", {}),
    ],
)
def test_what_is_loaded_is_what_was_pruned(
    tmp_path: Path, family: str, quantise: str, changes: dict[str, Any], order: str
) -> None:
    model = exported(tmp_path / "packed", family, quantise, order, **changes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, QuantisedLinear)}
    assert layers and not any("values" in dict(layer.named_parameters()) for layer in layers.values())
    expected, found = (of(input_ids=TOKENS_SL).logits for of in (model.eval(), loaded.eval()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if order == "original":
        for name, layer in layers.items():
            weight = model.get_submodule(name).weight
            assert torch.equal(layer.dense(), weight.T if family == "gpt2" else weight), name
    said = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    grid = esparse.option("quantise", quantise, group=16, **changes)
    assert said["grid"] == settings(grid) and said["version"] == 3
    stored = {k: v for file in (tmp_path / "packed").glob("*.safetensors") for k, v in load_file(file).items()}
    for name, layer in layers.items():
        own = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
        size = sum(v.nbytes for k, v in own.items() if not k.endswith(("bias", "order")))
        assert size == file_bytes(layer.pattern, layer.out_features, layer.in_features, grid)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "scale" in card and "here values are stored so." in card
    assert "transformers loads it after import esparse" in card and "vLLM" not in card


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(("own", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float32")])
def test_codes_are_exported_in_another_precision(tmp_path: Path, family: str, own: str, dtype: str) -> None:
    model = tiny(family).to(getattr(torch, own))
    parts = {"quantise": esparse.option("quantise", "int4", group=16), "update": "sparsegpt"}
    report = esparse.prune(model, None, "2:4", calibration=TOKENS_SL, shuffle=None, progress=False, **parts)
    out = esparse.save(model, None, report, tmp_path / "packed", packed=True, dtype=dtype)
    assert out["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert loaded.dtype == getattr(torch, dtype)
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, QuantisedLinear)}
    assert layers
    for name, layer in layers.items():  # what the model computed with is the same values, rounded to its precision
        assert torch.equal(layer.dense().to(model.dtype), model.get_submodule(name).weight), name


def changed(folder: Path, ending: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    """Changes a tensor, or takes it away, in the form of an older version whose checksums are right; returns its name.

    Older versions had a checksum for each file, and none for config.json.
    """
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    name = next(name for name in sorted(where) if name.endswith(ending))
    stored = load_file(folder / where[name])
    value = change(stored.pop(name))
    save_file(stored | ({} if value is None else {name: value}), folder / where[name], {"format": "pt"})
    as_older(folder)
    return name


@pytest.mark.parametrize("ending", ["codes", "index"])
def test_a_tensor_of_another_shape_is_named(ending: str, tmp_path: Path) -> None:
    exported(tmp_path, "llama", "int4", "physical")
    name = changed(tmp_path, f".{ending}", lambda value: value[:-1].contiguous())
    with pytest.raises(ValueError, match=rf"{re.escape(name)} of the shape .* asks for .* is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    exported(folder, "llama", "int4", "original")
    config = (folder / "config.json").read_text()
    changed(folder, "q_proj.scales", lambda scales: torch.full_like(scales, 255))  # NaN in float16
    with pytest.raises(ValueError, match=r"q_proj.*a scale is not a positive number"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)
    as_older(folder, grid={"class": "Nothing"})
    with pytest.raises(ValueError, match=r"its grid has other settings"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for family in ("llama", "mixtral"):
        exported(folder / family, family, "int3", "original", symmetric=False, rounding="nearest")
    return folder


@pytest.mark.tries(1)
@pytest.mark.parametrize("ending", ["codes", "zeros", "scales", "index"])
def test_tensors_that_are_missing_are_named(ending: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "llama", tmp_path / "packed")
    name = changed(tmp_path / "packed", f"q_proj.{ending}", lambda value: None)
    with pytest.raises(ValueError, match=re.escape(f"the checkpoint has no {name}, which its config.json asks for")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": GONE}, "the checkpoint has no model.layers.0.mlp.down_proj.values, which its config.json asks for"),
        ({"symmetric": True}, "down_proj.zeros, of which its config.json says nothing"),
        ({"class": "NormalFloat"}, "its grid has other settings"),
        ({"ordered": []}, ".order, of which its config.json says nothing"),
    ],
    ids=str,
)
def test_a_grid_that_was_edited_is_refused(change: dict[str, Any], words: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "llama", tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    entry = config["quantization_config"]
    change = change if change.keys() <= entry.keys() else {"grid": entry["grid"] | change}
    as_older(tmp_path / "packed", **change)
    with pytest.raises(ValueError, match=re.escape(words)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    edited = {key: value for key, value in (entry | change).items() if value != GONE}
    file.write_text(json.dumps(config | {"quantization_config": edited}))
    with pytest.raises(ValueError, match=r"config\.json is damaged or was edited"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_order_of_codes_that_is_none_is_damage(family: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / family, tmp_path / "packed")
    name = changed(tmp_path / "packed", "down_proj.order", lambda order: torch.zeros_like(order))
    layer = re.escape(name.removesuffix(".order"))
    with pytest.raises(ValueError, match=rf"the packed layer {layer} cannot be read: the order of its 48 channels"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
