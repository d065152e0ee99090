"""Parts that others bring: on the command line, in records, from Python; and how many places one of ours has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose

import esparse
from esparse.cli import registry
from esparse.metrics import Metric
from esparse.metrics.wanda import Wanda
from esparse.parts import plugins
from esparse.parts.conf_folder import conf_folder
from tests.composing import composing
from tests.models.families import tiny
from tests.workshop import ROOT, furnished, launch_anew, small_run

METRICS = """
from dataclasses import dataclass

from esparse.metrics import Metric


@dataclass(kw_only=True, slots=True)
class Mine(Metric):
    exponent: float = 0.5

    def collects(self):
        from esparse.stats import ColumnNorm

        return {"norm": ColumnNorm}

    def score(self, weight_OI, stats):
        return weight_OI.abs() * stats["norm"].norm_I("sequence") ** self.exponent


@dataclass(kw_only=True, slots=True)
class Wanda(Mine):
    seed: int

    def score(self, weight_OI, stats):
        return weight_OI.abs()


def no_down_proj(model):
    model.seen = True
    return ["down_proj"] if model.config.num_hidden_layers == 3 else []
"""
ENTRY_POINTS = """
[esparse.metric]
mine = our_metrics.metrics:Mine
ours = our_metrics.metrics:Wanda
sparsegpt = our_metrics.metrics:Mine
gone = our_metrics.metrics:Nowhere
text = our_metrics.metrics:dataclass
[esparse.quirk]
llama = our_metrics.metrics:no_down_proj
[esparse.shuffle]
reversed = our_metrics.shuffles:Reversed
"""
SHUFFLES = """
from dataclasses import dataclass

from esparse.shuffles import Shuffle


@dataclass(kw_only=True, slots=True)
class Reversed(Shuffle):
    def order(self, scores_OI, pattern, layers=None):
        import torch

        return torch.arange(scores_OI.shape[1]).flip(0).view(-1, pattern.m).flip(1).flatten()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip would have installed it."""
    folder = tmp_path / "site"
    (folder / "our_metrics").mkdir(parents=True)
    (folder / "our_metrics" / "__init__.py").write_text("")
    (folder / "our_metrics" / "metrics.py").write_text(METRICS)
    (folder / "our_metrics" / "shuffles.py").write_text(SHUFFLES)
    (folder / "our_metrics" / "ours.yaml").write_text("# ours\nexponent: 2.0\nseed: ${seed}\n")
    (folder / "our_metrics-1.0.dist-info").mkdir()
    (folder / "our_metrics-1.0.dist-info" / "METADATA").write_text("Name: our-metrics\nVersion: 1.0\n")
    (folder / "our_metrics-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    return folder


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    return furnished(tmp_path, blocks=1)


@pytest.fixture
def here(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package in this process, too."""
    monkeypatch.syspath_prepend(package)
    plugins._from_packages.cache_clear()
    monkeypatch.setattr(plugins, "_registered", {group: {} for group in plugins._registered})
    yield
    plugins._from_packages.cache_clear()
    for name in [name for name in sys.modules if name.startswith("our_metrics")]:
        del sys.modules[name]


@pytest.mark.slow
def test_a_package_adds_options_that_are_swept_and_recorded(package: Path, workshop: Path, tmp_path: Path) -> None:
    done = launch_anew("-m", *small_run(workshop, tmp_path / "out"), "metric=wanda,mine,ours", "shuffle=none,reversed")
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/result.json")]
    assert len(records) == 6
    by_choice = {r["config"]["choices"]["metric"]: r["config"]["metric"] for r in records}
    assert by_choice == {
        "wanda": {"_class": "Wanda"},
        "mine": {"exponent": 0.5, "_class": "our_metrics.metrics:Mine"},
        "ours": {"exponent": 2.0, "seed": 0, "_class": "our_metrics.metrics:Wanda"},
    }
    assert {r["name"] for r in records} >= {"model 2:4 mine", "model 2:4 ours reversed"}
    assert all(r["sparsity"]["pattern_holds"] for r in records)
    assert "reversed" in done.stdout
    for name, why in (
        ("sparsegpt", "esparse has a metric 'sparsegpt' itself"),
        ("gone", "no attribute 'Nowhere'"),
        ("text", "must be a dataclass that extends esparse.metrics.Metric"),
    ):
        assert re.search(f"metric={name} of the package our-metrics is left out: .*{why}", done.stderr)


def test_its_options_stand_in_help_and_take_settings(package: Path, workshop: Path, tmp_path: Path) -> None:
    shown = launch_anew("--help").stdout
    assert re.search(r"metric=mine\b", shown)
    assert re.search(r"shuffle=reversed\b", shown)
    shown = launch_anew("metric=mine", "metric.exponent=0.25", "--cfg", "job").stdout
    assert "exponent: 0.25" in shown
    mistaken = launch_anew("metric=mine", "metric.exponent=much")
    assert (mistaken.returncode, "metric.exponent" in mistaken.stderr) == (2, True)


def test_a_sweep_in_a_queue_finds_them_again(here: None) -> None:
    with composing(conf_folder()):
        config = compose("config", ["metric=ours", "shuffle=reversed", "seed=3"], return_hydra_config=True)
    asked = registry.build(config)
    settings = json.loads(json.dumps(registry.resolved(config, asked, config.hydra.runtime.choices)))
    assert registry.rebuilt(settings) == asked
    assert (type(asked.metric), asked.metric.seed) == (plugins.of("metric")["ours"], 3)
    settings["metric"]["_class"] = "our_metrics.metrics:Gone"
    with pytest.raises(ValueError, match="submit the sweep anew"):
        registry.rebuilt(settings)


def test_python_takes_them_by_name(here: None) -> None:
    tokens_SL = torch.randint(1, 96, (2, 16))
    assert esparse.option("metric", "mine").exponent == 0.5
    assert esparse.option("metric", "ours", exponent=3).exponent == 3.0
    report = esparse.prune(tiny("llama"), None, metric="ours", shuffle="reversed", calibration=tokens_SL, seed=7)
    assert report.config["metric"] == {"exponent": 2.0, "seed": 7, "_class": "our_metrics.metrics:Wanda"}
    assert report.name == "2:4 ours reversed"
    with pytest.raises(ValueError, match="did you mean mine"):
        esparse.option("metric", "minee")


def test_a_family_may_have_a_quirk(here: None) -> None:
    tokens_SL, model = torch.randint(1, 96, (2, 16)), tiny("llama")
    report = esparse.prune(model, None, metric="magnitude", calibration=tokens_SL)
    assert model.seen
    assert not [name for name in report.keeps if "down_proj" in name]
    assert len(report.keeps) == 6 * 3
    esparse.register("quirk", "gpt2", lambda model: ["attn"])
    report = esparse.prune(tiny("gpt2"), None, metric="magnitude", calibration=tokens_SL)
    assert {name.split(".")[3] for name in report.keeps} == {"mlp"}
    with pytest.raises(ValueError, match="must be a function of the model"):
        esparse.register("quirk", "gpt2", "attn")


@dataclass(kw_only=True, slots=True)
class OfANotebook(Metric):
    """Made for these tests."""

    power: float = 2.0

    def score(self, weight_OI: torch.Tensor, stats: Any) -> torch.Tensor:
        return weight_OI.abs() ** self.power


def test_a_notebook_registers_its_own(here: None) -> None:
    esparse.register("metric", "own", OfANotebook)
    esparse.register("metric", "own", OfANotebook)  # the cell is carried out again
    tokens_SL = torch.randint(1, 96, (2, 16))
    report = esparse.prune(tiny("llama"), None, metric="own", calibration=tokens_SL)
    assert report.config["metric"] == {"power": 2.0, "_class": f"{__name__}:OfANotebook"}
    for group, name, component, words in (
        ("metric", "wanda", OfANotebook, "esparse has a metric 'wanda' itself"),
        ("metric", "mine", OfANotebook, "a package has a"),
        ("metric", "a-b", OfANotebook, "one word"),
        ("shuffle", "own", OfANotebook, "extends esparse.shuffles.Shuffle"),
        ("model", "own", OfANotebook, "nothing can be added to the group 'model'"),
        ("metric", "other", OfANotebook(), "must be a dataclass"),
    ):
        with pytest.raises(ValueError, match=words):
            esparse.register(group, name, component)  # type: ignore[arg-type]


def test_classes_of_one_name_are_told_apart(here: None) -> None:
    """Ours keep their bare names, so that run ids stay as they are."""
    assert {plugins.class_name(c) for known in registry.CHOICES.values() for c in known.values()} >= {"Wanda", "Then"}
    assert plugins.class_name(plugins.of("metric")["ours"]) != plugins.class_name(Wanda) == "Wanda"


def test_contributing_says_all_the_places_of_a_metric() -> None:
    """`fisher` stands in no other file than those that CONTRIBUTING.md lists, and in each of them.

    README, results and changes may name any metric.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (listed,) = re.findall(r"^A new metric `NAME` has (\d+) places:\n\n((?:- .*\n)+)", text, flags=re.M)
    files = re.findall(r"^- `([^`]+)`", listed[1], flags=re.M)
    assert int(listed[0]) == len(files)
    said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    product = [name for name in said.split("\0") if re.match(r"(conf|docs|esparse|hydra_plugins)/|[^/]+$", name)]
    product = [name for name in product if name not in {"CHANGELOG.md", "README.md", "docs/results.md"}]
    found = {n for n in product if (ROOT / n).is_file() and n.endswith((".py", ".yaml", ".md"))}
    found = {name for name in found if re.search("fisher", (ROOT / name).read_text(), flags=re.I)}
    assert found - {"CONTRIBUTING.md"} == {file.replace("NAME", "fisher") for file in files}
