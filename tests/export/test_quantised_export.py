"""A quantised model that is exported packed: files at the size that is counted, and the same values when loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import esparse
from esparse.packed.checksums import checksum
from esparse.packed.grid_sizes import file_bytes
from esparse.packed.quantised_layer import QuantisedLinear
from esparse.quantise.grids import settings
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


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    exported(folder, "llama", "int4", "original")
    file = next(file for file in folder.glob("*.safetensors") if any("q_proj" in key for key in load_file(file)))
    stored, config = load_file(file), json.loads((folder / "config.json").read_text())
    name = next(name for name in stored if name.endswith("q_proj.scales"))
    stored[name] = torch.full_like(stored[name], 255)  # NaN in float16
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"00004.safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)
    config["quantization_config"]["files"][file.name] = checksum(file)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"q_proj.*a scale is not a positive number"):
        AutoModelForCausalLM.from_pretrained(folder)
    config["quantization_config"]["grid"] = {"class": "Nothing"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"its grid has other settings"):
        AutoModelForCausalLM.from_pretrained(folder)
