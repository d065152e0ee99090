"""The laptop versions of the experiments: they compose, and what came out replaces what stood there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml
from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from esparse.cli import registry
from esparse.reports.command import main as tables
from tests.composing import composing

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))

spec = importlib.util.spec_from_file_location("laptop", ROOT / "experiments" / "laptop.py")
assert spec is not None and spec.loader is not None
laptop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laptop)


def test_every_sweep_has_a_laptop_version_or_says_why_not() -> None:
    for path in EXPERIMENTS:
        text = path.read_text()
        if "MULTIRUN" in text:
            assert laptop.commands(path) or "# Not on a laptop:" in text, path.name


@pytest.mark.tries(2)
@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if laptop.commands(path)], ids=lambda path: path.stem)
def test_laptop_versions_compose(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, table = laptop.commands(path)
    assert run[:6] == ["python", "launch.py", "-cd", "experiments", "-cn", path.stem]
    assert table[:4] == ["python", "-m", "esparse.tables", f"outputs/{path.stem}"]
    assert tables([str(tmp_path), *table[4:]]) == 1  # its options are known, no record is there
    assert "no run has finished" in capsys.readouterr().err
    in_file = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    asked = dict(word.split("=", 1) for word in run[6:])
    texts = [f"{key}={value}" for key, value in (in_file | asked).items()]
    jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(texts), None)[0]
    assert 1 < len(jobs) <= 20
    seen: set[str] = set()
    jobs = [job for job in jobs if set(job) - seen and not seen.update(job)]  # every value at least once
    with composing(ROOT / "experiments"):
        for job in jobs:
            config = compose(path.stem, [f"hydra.searchpath=[file://{ROOT / 'conf'}]", *job])
            assert registry.build(config).model.path == "builtin"


def test_a_part_of_the_page_is_replaced_by_itself() -> None:
    page = f"# Page\n\n{laptop.BEGIN}\n{laptop.END}\n\nbehind\n"
    page = laptop.filled(page, {"b": "### b\n\nold\n", "c": "### c\n\n| x |\n"})
    page = laptop.filled(page, {"a": "### a\n\nfirst\n", "b": "### b\n\nnew\n"})
    inside = "### a\n\nfirst\n\n### b\n\nnew\n\n### c\n\n| x |"
    assert page == f"# Page\n\n{laptop.BEGIN}\n\n{inside}\n\n{laptop.END}\n\nbehind\n"
