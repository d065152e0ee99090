"""Matrices with several names: of blocks that share them, and tied by hand within a block."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import esparse
from tests.models.families import tiny

TOKENS_SL = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(3))


def sharing(*, within: bool) -> PreTrainedModel:
    """Blocks 0 and 2 have one MLP, or each block one matrix for k and v."""
    model = tiny("llama")
    first, *_, last = model.model.layers
    if within:
        for block in model.model.layers:
            block.self_attn.v_proj.weight = block.self_attn.k_proj.weight
    else:
        for layer in ("gate_proj", "up_proj", "down_proj"):
            getattr(last.mlp, layer).weight = getattr(first.mlp, layer).weight
    return model


@pytest.mark.tries(2)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("shuffle", ["none", "esparse", "foldable"])
def test_a_shared_matrix_is_pruned_once_and_stored_for_all(
    within: bool, shuffle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = sharing(within=within)
    with caplog.at_level(logging.INFO, "esparse"):
        report = esparse.prune(model, None, "2:4", metric="wanda", shuffle=shuffle, calibration=TOKENS_SL)
    shared = "model.layers.0.self_attn.v_proj" if within else "model.layers.2.mlp.down_proj"
    assert f"{shared} is a matrix that was pruned already under another name" in caplog.text
    assert "sparse already" not in caplog.text and f"{shared}.weight" not in report.keeps
    assert report.pattern_holds and report.density == 0.5
    esparse.save(model, None, report, tmp_path / "dense", order="original" if shuffle == "esparse" else "physical")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert torch.equal(again.get_parameter(f"{shared}.weight"), model.get_parameter(f"{shared}.weight"))
    torch.testing.assert_close(again(TOKENS_SL).logits, model(TOKENS_SL).logits)
    with pytest.raises(ValueError, match="are one weight, which export=packed cannot say: use export=dense"):
        esparse.save(model, None, report, tmp_path / "packed", packed=True)
    esparse.pack(model, report)
    torch.testing.assert_close(model(TOKENS_SL).logits, again(TOKENS_SL).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("update", "said"), [("sparsegpt", False), ("sparsegpt_parent", True)])
def test_a_dense_stream_that_meets_pruned_weights_is_said(
    update: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "esparse"):
        esparse.prune(sharing(within=False), None, "2:4", update=update, calibration=TOKENS_SL)
    assert ("blocks with weights of earlier ones (1, the first: model.layers.2)" in caplog.text) == said
