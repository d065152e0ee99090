"""Shares of zeros against counts taken one by one on what the model itself returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from esparse.evaluate import zeros
from esparse.evaluate.zeros import THRESHOLDS, report, shares
from esparse.models.blocks import BlockModel
from tests.evaluate.test_zeroshot import tiny_model
from tests.models.families import tiny
from tests.reports.test_tables import command
from tests.workshop import launch

TOKENS_SL = torch.randint(1, 96, (3, 12), generator=torch.Generator().manual_seed(5))


def blocks_of(family: str) -> BlockModel:
    return BlockModel(tiny(family), device=torch.device("cpu"), batch_tokens=64)


def one_by_one(values: list[float], scale: float) -> dict[str, float]:
    counts = {f"{t:g}": sum(abs(v) <= t * scale for v in values) for t in THRESHOLDS}
    return {"values": len(values)} | {t: count / len(values) for t, count in counts.items()}


def by_rms(x: torch.Tensor) -> dict[str, float]:
    values = x.double().flatten().tolist()
    return one_by_one(values, (sum(v * v for v in values) / len(values)) ** 0.5)


def test_weights_by_hand() -> None:
    blocks = blocks_of("llama")
    weight = blocks.blocks[1].mlp.down_proj.weight.data
    weight.fill_(1.0)
    weight[0, :3] = torch.tensor([0.0, 0.005, -0.05])
    found = shares(blocks, TOKENS_SL)["weight", "model.layers.1.mlp.down_proj", None]
    n = weight.numel()
    assert found == {"values": n, "0": 1 / n, "0.001": 1 / n, "0.01": 2 / n, "0.1": 3 / n}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom", "mixtral"])
def test_weights_equal_a_slow_count(family: str) -> None:
    blocks = blocks_of(family)
    found = {name: value for (kind, name, _), value in shares(blocks, TOKENS_SL).items() if kind == "weight"}
    own = dict(blocks.model.named_parameters())
    assert len(found) >= 8
    for name, value in found.items():
        parameter = own[name] if name in own else own[f"{name}.weight"]
        assert value == pytest.approx(by_rms(parameter))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_activations_equal_a_slow_count(family: str) -> None:
    blocks, seen = blocks_of(family), {}
    layers = {n: m for n, m in blocks.model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        blocks.model(TOKENS_SL, use_cache=False)
    expected = {name: by_rms(torch.cat([x.flatten(0, -2) for x in parts])) for name, parts in seen.items()}
    found = {name: value for (kind, name, _), value in shares(blocks, TOKENS_SL).items() if kind == "activation"}
    assert len(found) == 4 * len(blocks.blocks)  # q/k/v, o, up, down; of OPT: q/k/v, out, fc1, fc2
    for name, value in found.items():
        assert value == pytest.approx(expected[name], abs=2e-3), name
    if family == "opt":  # ReLU: what enters the last layer of a block is often exactly zero
        assert all(0.2 < value["0"] < 0.8 for name, value in found.items() if name.endswith("fc2"))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom", "gemma2", "mixtral"])
def test_attention_equals_what_the_model_returns(family: str) -> None:
    blocks = blocks_of(family)
    found = {(name, head): v for (kind, name, head), v in shares(blocks, TOKENS_SL).items() if kind == "attention"}
    model = tiny(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(TOKENS_SL, output_attentions=True, use_cache=False).attentions
    assert len(found) == sum(p.shape[1] for p in attentions)
    for index, p_BNLL in enumerate(attentions):
        for head in range(p_BNLL.shape[1]):
            values = [
                p_BNLL[b, head, query, key].item() for b in range(3) for query in range(12) for key in range(query + 1)
            ]
            assert found[f"{blocks.prefix}.{index}", head] == pytest.approx(one_by_one(values, 1.0), abs=5e-3)


def test_the_model_is_as_before() -> None:
    blocks = blocks_of("llama")
    with torch.no_grad():
        before = blocks.model(TOKENS_SL).logits
    implementation = blocks.model.config._attn_implementation
    shares(blocks, TOKENS_SL)
    with torch.no_grad():
        assert torch.equal(blocks.model(TOKENS_SL).logits, before)
    assert blocks.model.config._attn_implementation == implementation != "eager"


def test_weights_that_are_read_block_by_block_give_the_same(tmp_path: Path) -> None:
    found = [shares(tiny_model(store, tmp_path)[0], TOKENS_SL) for store in ("memory", "shards")]
    assert found[0] == found[1]


def test_large_tensors_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = shares(blocks_of("llama"), TOKENS_SL)
    monkeypatch.setattr(zeros, "VALUES_AT_ONCE", 7)
    parts = shares(blocks_of("llama"), TOKENS_SL)
    assert all(parts[key] == pytest.approx(value) for key, value in usual.items())


def test_few_sequences_are_enough() -> None:
    many_SL = torch.cat([TOKENS_SL, TOKENS_SL, TOKENS_SL])
    assert shares(blocks_of("llama"), many_SL) == shares(blocks_of("llama"), many_SL[: zeros.SEQUENCES])


def test_a_row_has_both_sides() -> None:
    dense = {("attention", "h.0", 1): {"values": 4, "0": 0.0, "0.001": 0.25, "0.01": 0.5, "0.1": 1.0}}
    pruned = {("attention", "h.0", 1): {"values": 4, "0": 0.5, "0.001": 0.5, "0.01": 0.5, "0.1": 0.75}}
    made = report(dense, pruned, TOKENS_SL)
    assert (made["sequences"], made["length"], made["thresholds"]) == (3, 12, [0.0, 0.001, 0.01, 0.1])
    row = {"kind": "attention", "name": "h.0", "head": 1, "values": 4, "dense 0": 0.0, "dense 0.001": 0.25}
    row |= {"dense 0.01": 0.5, "dense 0.1": 1.0, "pruned 0": 0.5, "pruned 0.001": 0.5, "pruned 0.01": 0.5}
    assert made["rows"] == [row | {"pruned 0.1": 0.75}]


@pytest.mark.slow
def test_a_run_reports_it(tmp_path: Path) -> None:
    overrides = ["profile=true", "shuffle=none", "evaluate=none", "tracking=none", f"output_root={tmp_path}"]
    done = launch(*overrides, "calibration.sequences=2", "calibration.length=32")
    assert done.returncode == 0, done.stderr
    profile = json.loads(next(tmp_path.glob("*/result.json")).read_text())["profile"]
    assert profile["sequences"] == 2
    weights = [row for row in profile["rows"] if row["kind"] == "weight"]
    assert len(weights) == 28 and all(row["dense 0"] < 0.01 and row["pruned 0"] == 0.5 for row in weights)
    assert len([row for row in profile["rows"] if row["kind"] == "attention"]) == 24  # 4 blocks of 6 heads
    code, out, err = command(tmp_path, "--profile")
    assert (code, err) == (0, "") and "| weight     | model.layers.0.self_attn.q_proj |" in out
    assert command(tmp_path, "--out", tmp_path / "p.svg", "--plot", "profile")[0] == 0
    code, out, _ = command(tmp_path, "--profile", "--format", "html")
    assert code == 0 and ">attention</td>" in out
