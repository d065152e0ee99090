"""What is left out by default is of a kind, and everything that esparse offers is tried without it."""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from esparse.records.groups import GROUPS
from tests import kinds
from tests.api.test_every_option import OPTIONS as OF_METHODS
from tests.models.families import FAMILIES, MORE
from tests.test_conf import METHODS, OPTIONS
from tests.test_readme import ALL, ELSEWHERE, NOWHERE
from tests.workshop import ROOT

# What esparse does, and with which words the tests begin by which it is tried.
SUBJECTS = {
    "a run": "tests/cli/test_launch.py::test_a_run_leaves_the_record_of_the_contract",
    "a sweep": "tests/cli/test_launch.py::test_a_sweep_measures_the_dense_model_once",
    "a sweep in processes": "tests/sweeps/test_sweep.py::test_a_sweep_that_is_not_waited_for",
    "a resume": "tests/pruning/test_resume.py::test_killed_while_a_file_is_being_written",
    "an export": "tests/export/test_run.py::test_every_pruned_matrix_of_a_dense_export_holds",
    "a mistake": "tests/cli/test_launch.py::test_a_mistake_on_the_command_line_stops_before_any_work",
    "pruning from Python": "tests/api/test_prune_in_memory.py::test_the_masks_and_numbers_are_those_of_a_run",
    "a notebook": "tests/api/test_examples.py::test_the_notebook_runs",
    "the wheel": "tests/test_install.py::test_the_wheel_has_all_that_a_checkout_has",
    "a package of others": "tests/test_plugins.py::test_its_options_stand_in_help_and_take_settings",
    "several processes": "tests/parallel/test_ranks.py::test_ranks_tell_each_other",
    "zero-shot tasks": "tests/evaluate/test_zeroshot.py::test_",
    "tables": "tests/reports/test_tables.py::test_",
    "tracking": "tests/run/test_tracking.py::test_offline_run_holds_config_history_summary_and_table",
}


@pytest.fixture(scope="module")
def collected(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All tests that there are."""
    named = {Path(request.config.invocation_params.dir, argument) for argument in request.config.args}
    if not named <= {ROOT, ROOT / "tests"}:
        pytest.skip("says something about all tests: name none of them")
    return request.config.stash[kinds.COLLECTED]


@pytest.fixture(scope="module")
def by_default(collected: list[pytest.Item]) -> list[pytest.Item]:
    return [item for item in collected if chosen(kinds.DEFAULT, item)]


def chosen(expression: str, item: pytest.Item) -> bool:
    """Whether pytest -m takes it: such an expression is one of Python, in which the markers that it has are true."""

    class Markers(dict[str, bool]):
        def __missing__(self, name: str) -> bool:
            return item.get_closest_marker(name) is not None

    return eval(_compiled(expression), {}, Markers())


@functools.cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "-m", "eval")


def parameters(items: list[pytest.Item], *names: str) -> set[Any]:
    """The values of these parameters in all cases that have them."""
    of_cases = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return {tuple(params[name] for name in names) for params in of_cases if {*names} <= {*params}}


def test_the_kinds_are_left_out() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["addopts"][settings["addopts"].index("-m") + 1] == kinds.DEFAULT
    assert {*kinds.KINDS} <= {marker.partition(":")[0] for marker in settings["markers"]}


def test_ci_runs_every_test_once_and_properties_twice(collected: list[pytest.Item]) -> None:
    """The README's command is the first of its runs; those of properties try more examples in the second one."""
    script = (ROOT / ".ci" / "run").read_text()
    left_out = re.findall(r'^left_out="(.+)"$', script, flags=re.M)
    brought_up = re.findall(r"\.venv/bin/python -m pytest -m (\w+) -n 0 tests/(\w+)$", script, flags=re.M)
    assert brought_up == [(name, name) for name in kinds.BROUGHT_UP]
    assert len(left_out) == 1
    assert script.count(' -m "$left_out"\n') == 1
    expressions = [kinds.DEFAULT, *left_out, *kinds.BROUGHT_UP]
    for item in collected:
        property_by_default = item.get_closest_marker("hypothesis") and chosen(kinds.DEFAULT, item)
        times = sum(chosen(expression, item) for expression in expressions)
        assert times == (2 if property_by_default else 1), item.nodeid
        for name in kinds.BROUGHT_UP:
            assert item.path.parent.name == name or not item.get_closest_marker(name), item.nodeid


def test_every_test_is_tried_but_slow_ones_and_those_have_a_quicker_neighbour(
    collected: list[pytest.Item], by_default: list[pytest.Item]
) -> None:
    tried = {item.nodeid.partition("[")[0] for item in by_default}
    folders = {item.path.parent for item in by_default}
    for item in collected:
        test = item.nodeid.partition("[")[0]
        if not any(map(item.get_closest_marker, kinds.BROUGHT_UP)):
            assert test in tried or item.get_closest_marker("slow"), test
            assert item.path.parent in folders, test


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_is_tried(subject: str, by_default: list[pytest.Item]) -> None:
    assert [item for item in by_default if item.nodeid.startswith(SUBJECTS[subject])]


def test_every_option_of_a_method_prunes_and_every_other_one_is_composed(by_default: list[pytest.Item]) -> None:
    prunes = [item for item in by_default if item.nodeid.startswith("tests/api/test_every_option.py")]
    composes = [item for item in by_default if item.nodeid.startswith("tests/test_conf.py")]
    assert parameters(prunes, "group", "option") == {*OF_METHODS}
    models = {(group, option) for group, option in OPTIONS if group == "model"}
    composed = parameters(composes, "group", "option")
    assert {*OPTIONS} - models - {*OF_METHODS} | {("model", "tiny"), ("model", "hf")} <= composed
    assert {group for group, _ in composed} == {*GROUPS}
    assert parameters(composes, "name") == {(name,) for name in METHODS}


def test_every_family_is_tried(by_default: list[pytest.Item]) -> None:
    assert {(family,) for family in [*FAMILIES, *MORE]} <= parameters(by_default, "family")


def test_every_kernel_is_tried(by_default: list[pytest.Item]) -> None:
    """What a compiler makes: a loop is reached by what takes it, a Triton kernel is called by its file of tests."""
    modules = sorted((ROOT / "esparse" / "kernels").glob("*.py"))
    # One of which another one takes parts is tried with that.
    of_kernels = {path for path in modules if "@triton.jit" in path.read_text()}
    tried = "\n".join(path.read_text() for path in {item.path for item in by_default} | of_kernels)
    for path in modules:
        if "@triton.jit" in path.read_text():
            pytest.importorskip("triton")
            assert re.search(rf"esparse\.kernels(?:\.{path.stem}| import .*\b{path.stem})\b", tried), path.stem
        elif "@njit" in path.read_text():
            loops = {(which,) for which in ("compiled", "plain")}
            assert loops <= parameters(by_default, "loops")


def test_every_command_is_carried_out(by_default: list[pytest.Item]) -> None:
    """Each program of README.md; launch.py with one run, several runs, --help, and experiments."""
    of_readme = [item for item in by_default if item.nodeid.startswith("tests/test_readme.py")]
    commands = {command for (command,) in parameters(of_readme, "command")}
    ways = {program(command) for command in {*ALL} - ELSEWHERE.keys() - NOWHERE}
    assert {"launch.py -m", "launch.py --help", "launch.py -cd", "launch.py"} <= ways
    assert ways == {program(command) for command in commands if command not in ELSEWHERE}


def program(command: str) -> str:
    words = command.removeprefix("python ").removeprefix("-m ").split()
    return " ".join(word for word in words[:2] if word == words[0] or word.startswith("-"))
