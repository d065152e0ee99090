"""Which differences between methods are real, by experiments/significance.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from esparse.errors import Mistake

spec = importlib.util.spec_from_file_location(
    "significance", Path(__file__).parent.parent / "experiments" / "significance.py"
)
assert spec is not None and spec.loader is not None
significance = importlib.util.module_from_spec(spec)
spec.loader.exec_module(significance)

WINDOWS = 64


def kept(
    root: Path, run: str, losses: np.ndarray, *, seed: int = 0, length: int = 256, model: str = "tiny", **config: Any
) -> None:
    """A record with the losses of its windows."""
    choices = {"metric": "wanda", "shuffle": "none", "update": "none"} | config.pop("choices", {})
    record = {
        "id": run,
        "name": run,
        "status": "finished",
        "config": {"choices": choices, "seed": seed, **config},
        "model": {"name": model},
        "sparsity": {"pattern": "2:4", "density": 0.5},
        "quality": {"text": {"dense": 10.0, "pruned": float(np.exp(losses.mean())), "sequence_length": length}},
        "seconds": 1.0,
    }
    (root / run).mkdir()
    (root / run / "result.json").write_text(json.dumps(record))
    save_file({"pruned/text": losses}, root / run / "window_losses.safetensors")


def test_methods_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    losses = np.ones(WINDOWS)
    kept(tmp_path, "a", losses)
    kept(tmp_path, "b", losses, choices={"shuffle": "esparse"}, shuffle={"foldable": False, "block": 256})
    kept(tmp_path, "c", losses, choices={"shuffle": "esparse"}, shuffle={"foldable": True, "block": 256})
    kept(tmp_path, "d", losses, choices={"update": "alps"})
    kept(tmp_path, "e", losses, choices={"shuffle": "esparse"}, seed=1, shuffle={"foldable": False, "block": 256})
    found, length = significance.read_losses(tmp_path, "text")
    assert sorted(name for _, name in found) == [
        "wanda",
        "wanda + alps",
        "wanda + esparse",
        "wanda + esparse (shuffle.foldable=true)",
    ]
    assert length == 256


def test_models_stand_apart_and_choices_of_other_groups_tell_methods_apart(tmp_path: Path) -> None:
    kept(tmp_path, "a", np.ones(WINDOWS))
    kept(tmp_path, "b", np.ones(WINDOWS), seed=1)
    kept(tmp_path, "c", np.ones(WINDOWS + 1), model="large")
    kept(tmp_path, "d", np.ones(WINDOWS), choices={"quantise": "int4"}, model_skip=["a", "b"])
    found, _ = significance.read_losses(tmp_path, "text")
    assert sorted(found) == [
        (("large", "2:4"), "wanda"),
        (("tiny", "2:4"), "wanda"),
        (("tiny", "2:4"), "wanda (quantise=int4)"),
    ]


def test_two_runs_are_never_taken_for_one(tmp_path: Path) -> None:
    kept(tmp_path, "a", np.ones(WINDOWS))
    kept(tmp_path, "b", np.ones(WINDOWS))
    with pytest.raises(Mistake, match="two runs of wanda with seed 0: b is one of them"):
        significance.read_losses(tmp_path, "text")


def test_windows_of_two_lengths_are_refused(tmp_path: Path) -> None:
    kept(tmp_path, "a", np.ones(WINDOWS))
    kept(tmp_path, "b", np.ones(WINDOWS), choices={"metric": "ria"}, length=512)
    with pytest.raises(Mistake, match=r"windows of \[256, 512\] tokens"):
        significance.read_losses(tmp_path, "text")
    with pytest.raises(Mistake, match="measured on 'wikitext2'"):
        significance.read_losses(tmp_path, "wikitext2")


@pytest.mark.parametrize("windows", [1, 32])
def test_other_windows_are_refused(tmp_path: Path, windows: int) -> None:
    kept(tmp_path, "a", np.ones(WINDOWS))
    kept(tmp_path, "b", np.ones(windows), choices={"metric": "ria"})
    with pytest.raises(Mistake, match=f"the runs of tiny were measured on 64 windows and, b, on {windows}: compare"):
        significance.read_losses(tmp_path, "text")


def test_losses_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    kept(tmp_path, "a", np.ones(WINDOWS))
    file = tmp_path / "a" / "window_losses.safetensors"
    for spoil in (lambda: file.write_bytes(b"half"), file.unlink):
        spoil()
        with pytest.raises(Mistake, match=r"window_losses\.safetensors is missing or damaged"):
            significance.read_losses(tmp_path, "text")


def test_a_constant_difference_has_no_width() -> None:
    first, second = ({seed: np.full(WINDOWS, value) for seed in range(3)} for value in (2.0, 2.5))
    assert significance.compare(first, second, 8) == pytest.approx((np.exp(-0.5), np.exp(-0.5), np.exp(-0.5), 3, 3))


@pytest.mark.parametrize("neighbours", [1, 8, 100])
def test_the_interval_is_the_one_of_a_slow_bootstrap(neighbours: int) -> None:
    random = np.random.default_rng(1)
    windows = random.normal(0.1, 0.3, WINDOWS) + random.normal(0, 0.1, (3, 1))
    first = {seed: 2 + of_seed for seed, of_seed in enumerate(windows)}
    second = {seed: np.full(WINDOWS, 2.0) for seed in range(3)}
    runs = [windows[:, i : i + neighbours] for i in range(0, WINDOWS, neighbours)]
    drawn = []
    for _ in range(4000):
        of_runs = [runs[i] for i in random.integers(len(runs), size=len(runs))]
        seeds = random.integers(3, size=3)
        drawn.append(np.mean(np.concatenate([run[seeds] for run in of_runs], axis=1)))
    ratio, low, high, below, seeds_in_common = significance.compare(first, second, neighbours)
    assert ratio == pytest.approx(np.exp(windows.mean()))
    assert [low, high] == pytest.approx(np.exp(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    assert (below, seeds_in_common) == (sum(windows.mean(1) < 0), 3)


def test_one_window_or_samples_that_disagree_show_nothing() -> None:
    assert significance.verdict(0.8, 0.9, 3, 3) == "yes"
    assert significance.verdict(0.8, 0.9, 2, 3) == "not shown"
    assert significance.verdict(0.9, 1.1, 3, 3) == "not shown"
    assert significance.verdict(1.1, 1.2, 0, 3) == "worse"
    assert significance.verdict(1.1, 1.2, 1, 3) == "not shown"
    assert significance.verdict(0.8, 0.9, 1, 1) == "one sample"


def test_the_command_prints_a_table_or_says_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        kept(tmp_path, f"a{seed}", np.full(WINDOWS, 2.0), seed=seed)
        kept(tmp_path, f"b{seed}", np.full(WINDOWS, 1.5), seed=seed, choices={"update": "alps"})
    command = ["significance", str(tmp_path), "--corpus", "text", "--against"]
    monkeypatch.setattr("sys.argv", [*command, "wanda"])
    assert significance.main() == 0
    row = "| 2:4 | wanda + alps | 4.48 | wanda | 0.607 | 0.607 to 0.607 | 3 of 3 | yes |"
    assert row in capsys.readouterr().out.splitlines()
    monkeypatch.setattr("sys.argv", [*command, "magic"])
    assert significance.main() == 2
    assert "no method 'magic'; there is wanda, wanda + alps" in capsys.readouterr().err


def test_methods_are_compared_on_one_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for model, loss in (("tiny", 2.0), ("large", 1.0)):
        kept(tmp_path, model, np.full(WINDOWS, loss), model=model)
    command = ["significance", str(tmp_path), "--corpus", "text"]
    monkeypatch.setattr("sys.argv", [*command, "--against", "wanda"])
    assert significance.main() == 1
    assert "has no method beside 'wanda' on the same model, pattern and seed" in capsys.readouterr().err
    for model, loss in (("tiny", 1.5), ("large", 0.5)):
        kept(tmp_path, f"{model} ria", np.full(WINDOWS, loss), model=model, choices={"metric": "ria"})
    assert significance.main() == 0
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert sorted(rows) == [
        ["large 2:4", "ria", "1.65", "wanda", "0.607"],
        ["tiny 2:4", "ria", "4.48", "wanda", "0.607"],
    ]
    monkeypatch.setattr("sys.argv", command)
    assert significance.main() == 1
    assert "has no pair of the ladder (--against names a method)" in capsys.readouterr().err
