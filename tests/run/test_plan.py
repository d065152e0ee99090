"""The plan of a run: its numbers, from a configuration without weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import esparse
from esparse.cli import foresight
from esparse.metrics.wanda import Wanda
from esparse.models import host_memory
from esparse.models.load import ASSETS
from esparse.patterns import NM
from esparse.pruning.method import Method
from esparse.recoveries import Chain
from esparse.run.duration import Work, gpus, measured, published
from esparse.run.plan import Plan, plan
from esparse.shuffles import NoShuffle
from esparse.updates import NoUpdate
from esparse.updates.obs import Obs
from esparse.updates.parent import Parent
from tests.models.families import tiny
from tests.models.test_store import settings
from tests.workshop import launch

ROOT = Path(__file__).parents[2]
PUBLISHED: dict[str, dict[str, Any]] = {
    Path(path).stem: shapes[yaml.safe_load(path.read_text())["path"]]
    for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))
    for shapes in [json.loads((ASSETS / "shapes.json").read_text())]
    if path.stem not in ("hf", "tiny")
}
# As their authors give them, in thousand millions.
BILLIONS = {
    "llama-7b": 6.7,
    "llama-13b": 13.0,
    "llama-30b": 32.5,
    "llama-65b": 65.2,
    "llama2-7b": 6.7,
    "llama2-13b": 13.0,
    "llama2-70b": 69.0,
    "llama3-8b": 8.0,
    "llama3-70b": 70.6,
    "llama3.1-8b": 8.0,
    "mistral-7b": 7.24,
    "qwen2.5-7b": 7.61,
    "qwen3-8b": 8.19,
    "opt-125m": 0.125,
    "opt-6.7b": 6.66,
    "opt-30b": 30.0,
    "bloom-176b": 176.2,
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm2-1.7b": 1.711,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "gemma3-270m": 0.268,
    "gemma3-1b": 1.0,
    "llama3.2-1b": 1.236,
    "llama3.2-3b": 3.213,
    "pythia-160m": 0.1623,
    "pythia-1.4b": 1.415,
    "olmo2-1b": 1.485,
}
# By hand: embeddings (and head), then per block the matrices, biases and norms, then the last norm.
COUNTS = {
    "llama-65b": 2 * 32000 * 8192 + 80 * (4 * 8192**2 + 3 * 8192 * 22016 + 2 * 8192) + 8192,
    "opt-30b": (50272 + 2050) * 7168
    + 48 * (4 * (7168**2 + 7168) + 2 * 7168 * 28672 + 28672 + 7168 + 4 * 7168)
    + 2 * 7168,
    "bloom-176b": 250880 * 14336 + 2 * 14336 + 70 * (12 * 14336**2 + 9 * 14336 + 4 * 14336) + 2 * 14336,
}
METHOD = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle())


def planned(folder: Path, config: dict[str, Any], method: Method = METHOD, **how: Any) -> Plan:
    (folder / "config.json").write_text(json.dumps(config))
    model = settings(folder, "shards", how.pop("dtype", "float16"))
    where = {name: how.pop(name) for name in ("device", "gpu_memory") if name in how}
    for name, value in how.items():
        setattr(model, name, value)
    return plan(model, method, display_name="x", sequences=128, length=2048, window=2048, **where)


def test_layers_that_are_observed_again_take_passes_and_a_dense_copy(tmp_path: Path) -> None:
    once, again = (
        planned(tmp_path, PUBLISHED["bloom-176b"], replace(METHOD, update=update))
        for update in (
            Parent(trust=0.5, damp=0.01, sequential=sequential, residual=0, update=NoUpdate())
            for sequential in (False, True)
        )
    )
    # Both streams advance, one observes, both once more in pairs; again: three inputs, passes that end at the layer.
    assert (once.passes, again.passes) == (5, 9)
    more = again.peaks()["prune a block"][0] - once.peaks()["prune a block"][0]
    assert more == again.copied == again.largest_block
    assert once.copied == 0
    stream = planned(
        tmp_path,
        PUBLISHED["bloom-176b"],
        replace(METHOD, update=Parent(trust=0.5, damp=0.01, sequential=True, residual=0.25, update=NoUpdate())),
    )
    width = 14336  # of BLOOM's stream: a float32 for each pair of it and of what o_proj and down_proj read
    assert stream.statistics - again.statistics == 4 * width * (width + 4 * width)


@pytest.mark.tries(1)
@pytest.mark.parametrize("name", COUNTS)
def test_published_models_are_planned_without_weights(name: str, tmp_path: Path) -> None:
    config = PUBLISHED[name]
    got, width = planned(tmp_path, config), config["hidden_size"]
    assert got.parameters == COUNTS[name]
    assert got.weights == 2 * got.parameters
    assert got.stream == 128 * 2048 * width * 2
    assert got.ends + got.blocks * got.largest_block == got.weights
    assert got.passes == 2  # observe, advance
    assert got.peaks()["prune a block"][0] < got.weights / 2


@pytest.mark.slow
def test_the_shapes_that_ship_have_as_many_parameters_as_their_authors_say() -> None:
    assert set(PUBLISHED) == set(BILLIONS)
    for name, shape in PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], rel=0.02), name


def test_a_gram_is_counted_once_for_layers_that_read_one_tensor(tmp_path: Path) -> None:
    config = PUBLISHED["llama-65b"]
    update = Obs(mask="start", damp=0.01, block=128)
    with_gram = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), update=update)
    more = planned(tmp_path, config, with_gram).statistics - planned(tmp_path, config).statistics
    # q, k, v; o; gate, up; down
    assert more == 4 * (3 * 8192**2 + 22016**2)


def test_inputs_that_wait_for_a_second_pass_are_counted(tmp_path: Path) -> None:
    """LLaMA-7B's shape, 128 x 2048 tokens, as experiments/gpu.py prunes it on a GPU that is not here."""
    config = PUBLISHED["llama-7b"]
    twice = Method(metric=esparse.option("metric", "entropy"), pattern=NM(2, 4), shuffle=NoShuffle())
    all_inputs = 128 * 2048 * (3 * 4096 + 11008) * 2  # q, k, v; o; gate, up; down
    for activations, method, gpu_memory, held in (
        ("host", twice, None, 2**31),
        ("device", twice, None, all_inputs),
        ("device", twice, 2**34, 2**32),  # a quarter
        ("host", twice, 2**32, 2**30),
        ("host", METHOD, None, 0),  # looks at the tokens once
    ):
        how = {"batch_tokens": 16384, "activations": activations, "device": "cuda", "gpu_memory": gpu_memory}
        got = planned(tmp_path, config, method, **how)
        assert got.held == held, (activations, gpu_memory)
        host, device = got.peaks()["prune a block"]
        beside = got.stream if activations == "device" else 0
        assert device == got.largest_block + got.statistics + got.working + held + beside
        assert host == got.masks + 2 * got.largest_block + 2 * (got.stream - beside)
        assert activations == "device" or device < 6e9
    on_cpu = planned(tmp_path, config, twice, activations="device")
    assert on_cpu.held > 0 and not on_cpu.on_device


def test_what_was_counted_is_what_a_model_has(tmp_path: Path) -> None:
    model = tiny("qwen2").to(torch.float16)
    model.config.save_pretrained(tmp_path)
    got = planned(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert got.parameters == sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    assert got.pruned_weights == sum(p.numel() for p in matrices)


def test_experts_are_counted_too(tmp_path: Path) -> None:
    model = tiny("mixtral")
    model.config.save_pretrained(tmp_path)
    got = planned(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert experts < got.pruned_weights < got.parameters


def test_auto_is_planned_as_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PUBLISHED["opt-30b"]
    for free, expected in ((2**40, False), (2**32, True)):
        monkeypatch.setattr(host_memory, "free_host_bytes", lambda free=free: free)
        got = planned(tmp_path, config, store="auto", activations="auto")
        assert (got.streams_weights, got.on_disk) == (expected, expected)


def test_layers_to_skip_that_are_not_there_are_a_mistake_in_a_plan_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'upproj' is found in no name"):
        planned(tmp_path, PUBLISHED["llama-65b"], skip=["upproj"])


@pytest.mark.parametrize("skip", [[r"layers\.\d+\.mlp"], ["mlp$"], ["up_proj", "gate_proj", "down_proj"]])
def test_statistics_of_layers_to_skip_are_not_counted(skip: list[str], tmp_path: Path) -> None:
    """By whatever part of their names; a block that is skipped as a whole has no part in it."""
    config = PUBLISHED["llama-65b"]
    whole, less = planned(tmp_path, config), planned(tmp_path, config, skip=["mlp"])
    assert planned(tmp_path, config, skip=skip).statistics == less.statistics < whole.statistics
    assert planned(tmp_path, config, skip=[*skip, r"layers\.0\."]).statistics == less.statistics


@pytest.mark.slow
def test_the_command_line_prints_a_plan_and_leaves_nothing(tmp_path: Path) -> None:
    args = ["model=llama-65b", "dry_run=true", f"output_root={tmp_path}/out"]  # its dtype float16 is float32 on a CPU
    done = launch(*args)
    assert done.returncode == 0, done.stderr
    assert "65,285,660,672 in 80 blocks" in done.stdout
    assert "huggyllama/llama-65b is not in the cache: its published shape is used" in done.stderr
    assert "peak, prune a block" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_arithmetic_is_what_is_counted_by_hand(tmp_path: Path) -> None:
    config, tokens = PUBLISHED["llama-65b"], 128 * 2048
    matrices = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    got = planned(tmp_path, config).work
    assert got.calibration == 2 * tokens * (2 * matrices + 80 * 4 * 2048 * 8192)  # two passes
    assert (got.statistics, got.evaluation) == (0, 0)
    with_gram = Method(
        metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), update=Obs(mask="start", damp=0.01, block=128)
    )
    grams = 80 * (3 * 8192**2 + 22016**2)
    assert planned(tmp_path, config, with_gram).work.statistics == 2 * tokens * grams


def test_trainings_are_counted_by_hand(tmp_path: Path) -> None:
    config, tokens = PUBLISHED["llama-65b"], 128 * 2048
    matrices, head = 80 * (4 * 8192**2 + 3 * 8192 * 22016), 32000 * 8192
    everything = COUNTS["llama-65b"]
    blocks = tokens * (2 * matrices + 80 * 4 * 2048 * 8192)
    block, distilled = esparse.option("recovery", "block"), esparse.option("recovery", "distill")
    lora = esparse.option("recovery", "distill_lora", epochs=1)
    cases: list[tuple[Any, int, float | None]] = [
        (block, (3 * block.epochs + 2) * blocks, None),
        (distilled, 4 * distilled.epochs * (blocks + 2 * tokens * head), 6 * everything + 13 * matrices),
        (replace(distilled, all_parameters=True), 0, 18 * everything + matrices),
        (lora, 4 * (blocks + 2 * tokens * head), 6 * everything + 5 * matrices),
        (Chain(first=block, second=block), 2 * (3 * block.epochs + 2) * blocks, None),
    ]
    for recovery, arithmetic, memory in cases:
        method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), recovery=recovery)
        got = planned(tmp_path, config, method)
        assert not arithmetic or got.work.training == arithmetic, recovery
        assert got.streams_weights == (memory is None)  # distillation reads nothing block by block
        if memory is None:
            assert "distil" not in got.peaks()
            continue
        inside = 2 * (2 * 8192 + 4 * 8192 + 2 * 22016 + 8192)  # q, k, v, o; gate, up; down; in and out
        assert got.distilled == memory + 2048 * 80 * inside + 2**23 // 32000 * 32000 * (2 * 2 + 5 * 4)
        host, on_cpu = (replace(got, on_cpu=there).peaks()["distil"] for there in (False, True))
        assert host[1] == got.distilled
        assert host[0] == 3 * got.weights + got.masks + 2 * got.stream  # student, parent, copy; hidden states
        assert on_cpu == (got.distilled + got.weights + got.masks + 2 * got.stream, 0)
    # In bfloat16 the student of LoRA stays as it is, and so is the copy of what is pruned
    method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), recovery=lora)
    whole, half = (planned(tmp_path, config, method, dtype=dtype).distilled for dtype in ("float16", "bfloat16"))
    assert whole is not None and half is not None
    assert whole - half == 2 * everything + 2 * matrices


def test_of_experts_only_those_that_a_token_meets_are_counted(tmp_path: Path) -> None:
    model = tiny("mixtral")
    model.config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    one, two = ({**text, "num_experts_per_tok": chosen} for chosen in (1, 2))
    more = planned(tmp_path, two).work.calibration - planned(tmp_path, one).work.calibration
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert more == 2 * 128 * 2048 * 2 * experts // text["num_local_experts"]


@pytest.mark.slow
def test_a_gpu_by_name_is_planned_for_at_its_published_rates(tmp_path: Path) -> None:
    work = Work(calibration=312 * 10**12, statistics=0, evaluation=624 * 10**12, moved=2039 * 10**9)
    assert published("a100").seconds(work) == pytest.approx(1 + 2 + 1)
    for name, said in gpus().items():
        assert said["source"] and published(name).arithmetic > 5e13, name
    done = launch("model=llama-7b", "calibration=c4", "evaluate=paper", "dry_run.device=a100")
    assert done.returncode == 0, done.stderr
    assert "at least for these on one A100 80GB SXM: estimated from 312 TFLOP/s and 2,039 GB/s" in done.stdout
    assert "not counted: wikitext2, ptb" in done.stdout
    assert "the largest peak (prune a block) fits into its 74.5 GiB" in done.stdout
    assert launch("dry_run=a1000").returncode == 2


@pytest.mark.slow
def test_what_this_machine_does_is_measured() -> None:
    rates = measured(torch.device("cpu"), torch.float32)
    assert rates.source is None and rates.arithmetic > 1e8 and rates.copy > 1e7


@pytest.mark.skipif(foresight.gpu_is_there(), reason="plans for the GPU that is here")
def test_a_gpu_that_is_not_here_can_be_planned_for_without_its_name() -> None:
    done = launch("model=llama-7b", "model.devices=cuda", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "device about" in done.stdout and "time                not estimated" in done.stdout
