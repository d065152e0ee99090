"""Rows of products: what is in them, what is wrong or fails, the limits, and what is asked for without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose

from esparse.bench import Bench, LayerShape, distinct, in_words
from esparse.bench import products as table
from esparse.bench.gemm import DTYPES, KERNEL_NAMES, Gemm
from esparse.bench.limits import Limits
from esparse.bench.products import Case, Kernel, Prepared, pruned
from esparse.bench.shapes import NAMED
from esparse.bench.timing import WallClock
from esparse.cli import registry
from esparse.parts import numbers
from esparse.patterns import NM, parse
from esparse.records.groups import GROUPS
from esparse.run.experiment import run
from tests.composing import composing
from tests.workshop import furnished, launch, small_run

CPU = torch.device("cpu")
SHAPES = ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]
OWN = [LayerShape("a.q", 32, 64), LayerShape("a.k", 32, 64), LayerShape("a.down", 64, 32)]


class NoAlgorithms:
    def search(self, cases: list[Case]) -> None:
        assert not cases

    def get(self, case: Case) -> None:
        return None


def gemm(**settings: Any) -> Gemm:
    usual: dict[str, Any] = {"shapes": ["own"], "tokens": [1, 32], "dtypes": ["float32"], "kernels": [], "cache": "x"}
    return Gemm(**usual | {"warm_up": 1, "repeats": 3, "least_ms": 0.1, "graph_below_ms": 0.5} | settings)


def measured(bench: Gemm, **more: Any) -> list[dict[str, Any]]:
    return bench.measure(OWN, NM(4, 8), CPU, WallClock(), NoAlgorithms(), limit_size=64, **more).rows


def test_a_row_per_shape_tokens_and_kernel() -> None:
    seen: list[dict[str, Any]] = []
    rows = measured(gemm(), on_row=seen.append)
    assert rows == seen
    got = [(row["layer"], row["matrices"], row["tokens"], row["n"], row["k"], row["kernel"]) for row in rows]
    assert got == [
        ("a.q", 2, 1, 32, 64, "packed"),
        ("a.q", 2, 1, 32, 64, "packed_gather"),
        ("a.q", 2, 32, 32, 64, "decode"),
        ("a.down", 1, 1, 64, 32, "packed"),
        ("a.down", 1, 1, 64, 32, "packed_gather"),
        ("a.down", 1, 32, 64, 32, "decode"),
    ]
    for row in rows:
        assert row["speedup"] == row["dense_ms"] / row["sparse_ms"]
        assert row["share_of_limit"] == row["limit_ms"] / row["sparse_ms"]
        assert row["relative_error"] < 1e-6
        assert row["dense_bytes"] == 32 * 64 * 4 and row["weight_bytes"] == 32 * 64 * 2 + 32 * 64 // 8
        assert row["pattern"] == "4:8"


def test_wrong_and_failing_kernels_have_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction\nand more")

    def kernel(call: Any) -> Kernel:
        return Kernel(lambda w, case: Prepared({"w": w}, w.nbytes), call, lambda case: None)

    kernels = {
        "right": kernel(lambda p, x, *_: x @ p.parts["w"].t()),
        "wrong": kernel(lambda p, x, *_: 1.01 * x @ p.parts["w"].t()),
        "not_finite": kernel(lambda p, x, *_: x @ p.parts["w"].t() * float("nan")),
        "fails": kernel(fails),
    }
    monkeypatch.setattr(table, "KERNELS", kernels)
    rows = {row["kernel"]: row for row in measured(gemm(tokens=[4]))[:4]}
    assert rows["right"]["speedup"] > 0
    assert "relative error 0.01" in rows["wrong"]["why_not"] and rows["wrong"]["sparse_ms"] is None
    assert "relative error inf" in rows["not_finite"]["why_not"]
    assert rows["fails"]["why_not"] == "no such instruction"
    assert rows["fails"]["dense_ms"] > 0 and rows["fails"]["speedup"] is None


def test_the_limit_by_hand() -> None:
    most = Limits(copy_bytes_per_s=1e9, flop_per_s={"bfloat16": 1e12})
    shape = {"rows": 1000, "inputs": 2000, "dtype": "bfloat16"}
    # one token: 4,000,000 bytes of weights and 2 * 3000 of activations
    dense = most.ms(weight_bytes=4_000_000, tokens=1, sparse_cores=False, **shape)
    assert dense == pytest.approx(4.006)
    packed = most.ms(weight_bytes=2_250_000, tokens=1, sparse_cores=False, **shape)
    assert dense / packed == pytest.approx(4.006 / 2.256)
    # 100,000 tokens: 4e11 operations, of which sparse tensor cores do half
    slow = Limits(copy_bytes_per_s=1e15, flop_per_s={"bfloat16": 1e12})
    assert slow.ms(weight_bytes=1, tokens=100_000, sparse_cores=False, **shape) == pytest.approx(400)
    assert slow.ms(weight_bytes=1, tokens=100_000, sparse_cores=True, **shape) == pytest.approx(200)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_weights_that_are_timed_are_truly_n_of_m(dtype: str) -> None:
    weight_RI = pruned(table.random_weight(16, 64, dtype, CPU), NM(2, 4))
    assert weight_RI.dtype == table.dtype(dtype)
    assert ((weight_RI.float() != 0).view(16, -1, 4).sum(-1) == 2).all()
    assert not torch.signbit(weight_RI.float()[weight_RI.float() == 0]).any()


def test_named_shapes_are_those_of_the_models() -> None:
    # hidden width, blocks, and 10^9 parameters as published
    models = {
        "llama-7b": (4096, 32, 6.7),
        "llama-13b": (5120, 40, 13.0),
        "llama-30b": (6656, 60, 32.5),
        "llama-65b": (8192, 80, 65.2),
        "opt-6.7b": (4096, 32, 6.7),
        "opt-30b": (7168, 48, 30.0),
    }
    vocabulary = {"llama": 2 * 32000, "opt": 50272 + 2050}  # OPT ties its head, and has learnt positions
    assert NAMED.keys() == models.keys()
    for name, layers in NAMED.items():
        hidden, blocks, published = models[name]
        pruned_weights = sum(layer.rows * layer.inputs * layer.matrices for layer in layers)
        whole = blocks * pruned_weights + vocabulary[name.partition("-")[0]] * hidden
        assert whole / 1e9 == pytest.approx(published, rel=0.01)
        assert layers[0].rows == hidden


def test_shapes_that_are_asked_for() -> None:
    layers = gemm(shapes=["own", "llama-7b"]).layers(OWN)
    assert [layer.layer for layer in layers] == [
        "a.q",
        "a.down",
        "llama-7b self_attn.q_proj",
        "llama-7b mlp.gate_proj",
        "llama-7b mlp.down_proj",
    ]
    assert distinct(OWN)[0].matrices == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shapes": ["llama-8b"]}, "bench.shapes may hold own, llama-7b, .* got llama-8b"),
        ({"shapes": []}, "got nothing"),
        ({"dtypes": ["fp16"]}, "bench.dtypes may hold float16, .* got fp16"),
        ({"kernels": ["magic"]}, "bench.kernels may hold cusparselt, .* got magic"),
        ({"tokens": [0]}, "bench.tokens must be positive"),
        ({"repeats": 0}, "bench.repeats must be positive"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gemm(**settings)


def test_patterns_without_a_packed_form_are_refused() -> None:
    gemm().check(parse("8:16", None))
    with pytest.raises(ValueError, match="n:m patterns, not 50%"):
        gemm().check(parse("50%", None))


def test_names_that_are_known_without_torch_are_those_of_the_tables() -> None:
    assert tuple(table.KERNELS) == KERNEL_NAMES
    assert table.DTYPES == DTYPES


@pytest.mark.parametrize("bench", ["gemm", "model"])
def test_a_run_leaves_its_latencies_in_the_record(bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a run but the GPU, whose clock is the time of day here."""
    registry.register()
    overrides = [f"bench={bench}", "bench.warm_up=1", "bench.repeats=2", "bench.least_ms=0.1", "shuffle=lbs"]
    overrides += {"gemm": ["bench.tokens=[1]", "bench.dtypes=[float32]"], "model": ["bench.batches=[1]"]}[bench]
    workshop = furnished(tmp_path, blocks=1)
    with composing():
        asked = registry.build(compose("config", [*small_run(workshop, tmp_path), *overrides]))
    monkeypatch.setattr(Bench, "require", lambda *_: None)
    monkeypatch.setattr("esparse.bench.timing.CudaClock", lambda _: WallClock())
    monkeypatch.setattr("esparse.bench.search.Algorithms.of", lambda *_: NoAlgorithms())
    monkeypatch.setattr("esparse.bench.limits.limits", lambda *_, **__: Limits(1e10, {"float32": 1e11}))
    (tmp_path / "run").mkdir()
    record = run(asked, run_id="x", name="x", config={}, folder=tmp_path / "run")
    assert record == json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["seconds_by_stage"]["bench"] > 0
    rows = record["latency"]
    if bench == "gemm":
        assert [row["layer"] for row in rows[::2]] == [f"model.layers.0.{n}" for n in SHAPES]
        assert [row["matrices"] for row in rows[::2]] == [4, 2, 1]
        assert record["limits"]["copy_bytes_per_s"] == 1e10
    else:
        assert [row["phase"] for row in rows] == ["prefill", "decode"]
        assert rows[0]["gathers"] > 0 and rows[0]["packed_layers"] == 7
    assert all(row["speedup"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_a_run_says_so_before_any_work(tmp_path: Path) -> None:
    workshop = furnished(tmp_path, blocks=1)
    done = launch(*small_run(workshop, tmp_path / "out"), "bench=gemm")
    assert done.returncode == 2
    assert "times sparse kernels on a GPU, and this run computes on the cpu" in done.stderr
    assert not list((tmp_path / "out").glob("*/result.json"))
    assert not list((tmp_path / "out").glob("*/blocks/*"))


@pytest.mark.slow
def test_a_bench_of_a_pattern_without_packed_form_is_a_mistake(tmp_path: Path) -> None:
    done = launch("bench=gemm", "pattern=50%", "shuffle=none", f"output_root={tmp_path}")
    assert done.returncode == 2
    assert "bench=gemm measures kernels for n:m patterns, not 50%" in done.stderr


@pytest.mark.parametrize("name", ["gemm", "model"])
def test_a_bench_is_called_what_the_command_line_calls_it(name: str) -> None:
    bench, _ = numbers.option("bench", name, lambda group, own: GROUPS[group].component(own), outside=numbers.usual())
    with pytest.raises(ValueError, match=f"^bench={name} times sparse kernels on a GPU"):
        bench.require(torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^bench={name} measures kernels for n:m patterns"):
        bench.check(parse("50%"))


def test_rows_in_words() -> None:
    row = {"layer": "q", "n": 8, "k": 4, "dtype": "float16", "tokens": 1, "kernel": "packed", "why_not": None}
    row |= {"dense_ms": 0.5, "sparse_ms": 0.25, "speedup": 2.0, "limit_speedup": 1.78}
    assert in_words(row) == (
        "q 8 x 4 float16, 1 tokens: dense 0.5 ms, packed 0.25 ms, 2.00 times as fast, at most 1.78"
    )
    assert in_words(row | {"why_not": "wrong"}) == "q 8 x 4 float16, 1 tokens: packed was not timed: wrong"
    whole = {"phase": "decode", "sequences": 8, "prompt": 128, "kernel": "gemv"}
    whole |= {"dense_ms": 5.0, "sparse_ms": 10.0, "speedup": 0.5}
    assert in_words(whole) == "decode of 8 x 128 tokens: dense 5 ms, gemv 10 ms, 0.50 times as fast"
