"""A layer that does not multiply by its weight stays dense, and is named; it would be pruned by other inputs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import esparse
from esparse.models.multiplying import multiplies
from tests.models.families import EXPERTS, MLA, SMALL, tiny

TOKENS_SL = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(3))


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class Grouped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        groups = x.shape[-2]
        return torch.einsum("...gi,goi->...go", x, self.weight.unflatten(0, (groups, -1))).flatten(-2)


class Else(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flip(-1), self.weight)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(8, 6), True),
        (Conv1D(6, 8), True),
        (FalconLinear(8, 6), True),
        (Rounded(8, 6, bias=False), True),
        (Grouped(8, 6), False),
        (Else(8, 6), False),
        (nn.Linear(8, 6, device="meta"), True),
        (Else(8, 6, device="meta", dtype=torch.bfloat16), False),
        (FalconLinear(8, 6, device="meta", dtype=torch.bfloat16), True),
    ],
)
def test_what_multiplies(layer: nn.Module, expected: bool) -> None:
    before = {name: id(parameter) for name, parameter in layer.named_parameters()}
    assert multiplies(layer) is expected
    assert {name: id(parameter) for name, parameter in layer.named_parameters()} == before


def test_such_layers_stay_dense_and_are_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = tiny("llama")
    other = Else(32, 48, bias=False)
    other.weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj = other
    with caplog.at_level(logging.WARNING, "esparse"):
        report = esparse.prune(model, None, metric="wanda", calibration=TOKENS_SL)
    assert "1 layers stay dense" in caplog.text and "model.layers.1.mlp.up_proj (Else)" in caplog.text
    assert len(report.layers) == 20 and (other.weight != 0).all()


def test_a_family_with_grouped_layers_is_packed_as_it_computes(tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.deepseek_v4")
    sizes = SMALL | EXPERTS | MLA | {"n_routed_experts": 4, "head_dim": 8, "o_groups": 2, "o_lora_rank": 8}
    config = AutoConfig.for_model("deepseek_v4", **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    report = esparse.prune(model, None, metric="wanda", calibration=TOKENS_SL)
    esparse.save(model, None, report, tmp_path / "out", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS_SL).logits, model(TOKENS_SL).logits)
