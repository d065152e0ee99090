"""Parts by name without Hydra: what it would compose, and near matches for what there is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose

import esparse
from esparse.cli import registry
from esparse.parts.conf_folder import conf_folder
from esparse.recoveries.window import Window
from tests.composing import composing
from tests.test_conf import NEEDED, NEEDED_BY, OPTIONS

# What both can build: the rest of the groups is of a run.
GROUPS = {"calibration", "prepare", "metric", "allocation", "shuffle", "update", "recovery", "evaluate", "export"}
FIRST = dict(reversed(OPTIONS))
CASES = [
    pytest.param(group, option, marks=() if FIRST[group] == option else pytest.mark.slow)
    for group, option in OPTIONS
    if group in GROUPS
]


@pytest.fixture(autouse=True)
def conf_is_read() -> Iterator[None]:
    with composing(conf_folder()):
        yield


@pytest.mark.parametrize(("group", "option"), CASES)
def test_an_option_is_what_hydra_composes(group: str, option: str) -> None:
    extra = NEEDED.get(option, []) + NEEDED_BY.get((group, option), [])
    expected = getattr(registry.build(compose("config", [f"{group}={option}", *extra])), group)
    changes = {"path": "f.txt"} if option == "text" else {}
    assert esparse.option(group, option, **changes) == expected


def test_settings_are_changed_and_nested_ones_too() -> None:
    expected = registry.build(compose("config", ["update=joint", "update.second.first.steps=7"])).update
    assert esparse.option("update", "joint", second={"first": {"steps": 7}}) == expected
    expected = registry.build(compose("config", ["update=joint", "update@update.second.first=alps"])).update
    assert esparse.option("update", "joint", second={"first": "alps"}) == expected
    window = esparse.option("recovery", "window", learning_rate=1, clip=2.5)
    assert isinstance(window, Window)
    assert (window.learning_rate, window.clip) == (1.0, 2.5)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: esparse.option("metric", "wandaa"), "there is no metric 'wandaa': did you mean wanda\\?"),
        (lambda: esparse.option("metric", "zzz"), "there is no metric 'zzz'; there is entropy, esparse_paper, "),
        (lambda: esparse.option("metrics", "wanda"), "there is no group 'metrics': did you mean metric\\?"),
        (lambda: esparse.option("hydra", "wanda"), "there is no group 'hydra'"),
        (lambda: esparse.option("metric", "entropy", gama=1), "has no setting 'gama': did you mean gamma\\?"),
        (lambda: esparse.option("metric", "wanda", alpha=1), "has no setting 'alpha'; there is none"),
        (lambda: esparse.option("update", "joint", second={"frist": {}}), "has no setting 'frist'"),
        (lambda: esparse.option("update", "refine", first="alpz"), "there is no update 'alpz': did you mean alps"),
        (lambda: esparse.option("update", "refine", first=7), "update.first must be the name of an option, "),
        (lambda: esparse.option("metric", "entropy", bins="many"), "metric.bins must be an integer, got 'many'"),
        (lambda: esparse.option("metric", "entropy", bins=1.5), "metric.bins must be an integer, got 1.5"),
        (lambda: esparse.option("metric", "entropy", gamma=None), "metric.gamma must be a number, got None"),
        (lambda: esparse.option("metric", "entropy", gamma=True), "metric.gamma must be a number, got True"),
        (lambda: esparse.option("metric", "esparse_paper", norm="l3"), "metric.norm must be one of"),
        (lambda: esparse.option("calibration", "text", path=None), "needs a file"),
    ],
)
def test_a_mistake_is_a_sentence_with_what_is_near(ask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask()
