"""Model cards as the Hub reads them: by the Hub's own library, which refuses what it cannot take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from esparse.export.card import dense_card, packed_card
from esparse.export.hub_metadata import licence_of
from tests.export.test_export import RECORD

FACTS: dict[str, Any] = {
    "order": "physical",
    "bytes": 1000,
    "dtype": "bfloat16",
    "holds_in": 14,
    "of_layers": 14,
    "engines": "whatever loads it",
    "packed_layers": 14,
    "packed_experts": 0,
    "dense_experts": 0,
    "gathers": 0,
}


def record(path: str) -> dict[str, Any]:
    config = RECORD["config"] | {"model": {"path": path}, "calibration": RECORD["config"]["calibration"]}
    config["calibration"] |= {"corpus": "c4"}
    of = {"dense": 5.123, "pruned": 6.789, "tokens": 64, "sequence_length": 16}
    return RECORD | {"config": config, "quality": {"wikitext2": of}}


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_the_hubs_library_reads_what_was_measured(kind: str) -> None:
    write = dense_card if kind == "dense" else packed_card
    licence = {"license": "other", "license_name": "small", "license_link": "LICENSE"}
    text = write(record("someone/small"), FACTS | {"format": kind, "licence": licence})
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.base_model == "someone/small"
    assert (data.license, data.license_name, data.license_link) == ("other", "small", "LICENSE")
    assert data.datasets == ["allenai/c4", "Salesforce/wikitext"]
    assert {"sparse", "pruned", "esparse", "2:4"} <= set(data.tags) and ("packed" in data.tags) == (kind == "packed")
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == (
        "perplexity",
        6.789,
        "Salesforce/wikitext",
    )
    assert "python -m esparse model=hf model.path=someone/small pattern=2:4 metric=wanda shuffle=gns" in text


def test_a_folder_here_is_no_model_of_the_hub() -> None:
    text = dense_card(record("/data/secret/small"), FACTS | {"format": "dense"})
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.base_model is None and data.license is None
    assert "secret" not in text and "model.path=small" in text


def test_the_licence_is_the_originals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert licence_of(None) == licence_of(tmp_path) == {}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: llama2\nlicense_name: 7\ntags: [x]\n---\n# Small\n")
    assert licence_of(tmp_path) == {"license": "llama2"}
    card.write_text("# No metadata\n")
    assert licence_of(tmp_path) == {}
    assert not caplog.text
