"""What README.md, docs/ and experiments/ tell people to type is composed here, and links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from esparse.cli import registry
from esparse.models.blocks import BlockModel
from esparse.patterns import NM
from esparse.pruning.prune import Method, prune
from esparse.records.report import Stages
from esparse.shuffles import NoShuffle
from esparse.updates import NoUpdate
from tests.composing import composing
from tests.models.families import tiny
from tests.workshop import launch

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md")])
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))


def commands(page: Path) -> Iterator[str]:
    """Every `python launch.py ...` in a code block or between backticks."""
    text = page.read_text().replace("\\\n", " ")
    for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.S) + re.findall(r"`([^`\n]+)`", text):
        for line in block.splitlines():
            if match := re.search(r"\bpython3? launch\.py\b([^#&|]*)", line):
                yield match.group(1).strip()


# --help, experiments (-cn), GGUF files and the example of a metric have tests of their own.
ALL = sorted({c for page in PAGES for c in commands(page) if not re.search(r"--help|-cn|=power|\.gguf", c)})


def test_there_are_commands() -> None:
    assert len(ALL) >= 5


@pytest.mark.tries(3)
# A sweep is composed job by job; tests/test_readme.py carries sweeps out.
@pytest.mark.parametrize("command", [pytest.param(c, marks=pytest.mark.slow if "-m " in c else ()) for c in ALL])
def test_commands_compose(command: str) -> None:
    words = shlex.split(command)
    multirun = "-m" in words
    overrides = [
        word.replace("NAME_OR_DIR", "x").replace("FILE", "f.txt").replace("=DIR", "=.")
        for word in words
        if word != "-m"
    ]
    with composing():
        parsed = OverridesParser.create().parse_overrides(overrides)
        jobs = BasicSweeper.split_arguments(parsed, None)[0] if multirun else [overrides]
        for job in jobs:
            registry.build(compose("config", job))


@pytest.mark.parametrize(
    "experiment",
    [EXPERIMENTS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in EXPERIMENTS[1:])],
    ids=lambda path: path.stem,
)
def test_experiments_compose(experiment: Path) -> None:
    done = launch("-cd", "experiments", "-cn", experiment.stem, "--cfg", "job", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"-cn {experiment.stem}" in experiment.read_text()


def test_options_of_the_experiments_compose() -> None:
    options = sorted((ROOT / "experiments").glob("*/*.yaml"))
    assert options
    with composing():
        for path in options:
            where = f"hydra.searchpath=[file://{ROOT / 'experiments'}]"
            registry.build(compose("config", [where, f"{path.parent.name}={path.stem}"]))


def places(page: Path) -> set[str]:
    """What a link may name behind its #: the headings, as a site and a repository's page spell them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, place = target.partition("#")
            to = page.parent / file if file else page
            assert to.exists(), f"{page.name} links to {target}"
            assert not place or place in places(to), f"{page.name} links to {target}"


def test_each_public_report_names_tests_that_there_are() -> None:
    named = re.findall(r"`([\w/]+\.py)?(?:::(test_\w+))?`", (ROOT / "docs" / "public_reports.md").read_text())
    file, checked = "", 0
    for path, test in named:
        file = path or file
        if test or path:
            assert not test or f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
            checked += 1
    assert checked > 40


def test_the_docs_example_of_a_metric_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    blocks = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, flags=re.S))
    (tmp_path / "power_example.py").write_text(blocks["esparse/metrics/power.py"])
    (tmp_path / "conf" / "metric").mkdir(parents=True)
    (tmp_path / "conf" / "metric" / "power.yaml").write_text(blocks["conf/metric/power.yaml"])
    monkeypatch.syspath_prepend(tmp_path)
    power = importlib.import_module("power_example").Power
    monkeypatch.setitem(registry.CHOICES["metric"], "power", power)
    with composing():
        overrides = [f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "metric=power", "metric.exponent=2"]
        metric = registry.build(compose("config", overrides)).metric
    assert metric == power(exponent=2.0)
    blocks_of_model = BlockModel(tiny("llama"), device=torch.device("cpu"), batch_tokens=64)
    method = Method(metric=metric, pattern=NM(2, 4), shuffle=NoShuffle(), update=NoUpdate())
    assert prune(blocks_of_model, torch.randint(1, 96, (4, 16)), method, stages=Stages()).pattern_holds
