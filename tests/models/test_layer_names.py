"""The names in a checkpoint's blocks, known without torch, are those of the model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from esparse.models.layer_names import AS_IN_FILES, names_in_blocks, with_layers
from tests.models.families import SMALL


def saved(family: str, folder: Path, **how: object) -> set[str]:
    """Saves a tiny model; returns the names of weights in its blocks, and of the modules that they lie in."""
    settings = SMALL | ({} if family in ("starcoder2", "stablelm", "phi3") else {"head_dim": 8})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    model.save_pretrained(folder, **how)
    weights = [name for name, _ in model.named_parameters() if name.startswith("model.layers.")]
    return {part for name in weights for part in with_layers(name, 3)}


@pytest.mark.parametrize("family", AS_IN_FILES)
def test_names_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    names = saved(family, tmp_path)
    assert set(names_in_blocks(tmp_path) or ()) == names
    assert ("model.layers.0.self_attn" in names and "model.layers.2.self_attn.q_proj" in names) or family == "phi3"


def test_names_of_several_files_and_of_a_model_without_its_head(tmp_path: Path) -> None:
    whole = saved("llama", tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert set(names_in_blocks(tmp_path / "shards") or ()) == whole
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    model.model.save_pretrained(tmp_path / "headless")
    assert set(names_in_blocks(tmp_path / "headless") or ()) == whole


@pytest.mark.parametrize(
    "change",
    [{"model_type": "mixtral"}, {"quantization_config": {}}, {"auto_map": {}}, {"model_type": ["llama"]}, None],
    ids=str,
)
def test_of_others_nothing_is_said(change: dict[str, object] | None, tmp_path: Path) -> None:
    saved("llama", tmp_path)
    if change is None:
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert names_in_blocks(tmp_path) is None
