"""Which cases of the tests a newcomer waits for, and which only CI runs: each left-out case is of a kind, a marker.

A test with many parameters has a case for each combination of them. By default every value of every parameter is
tried once, as few cases as it takes; the rest is `product`. A test that goes through all model families takes a share
of them by default, another one than the next test; the rest is `families`. A test of many mistakes or commands that
are handled by the same code is marked `tries(N)`: by default N of its cases; the rest is `many`. What takes seconds is
marked `slow` by hand, beside a quicker test of the same subject. tests/test_kinds.py says what must not be left out.

`pytest -m "not slurm"` runs all kinds, `pytest -m product` one of them, and what is named with `::` always runs. A test
that needs a Slurm or a vLLM waits to be asked for it: `pytest -m vllm`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

import pytest

KINDS = ("product", "families", "many", "slow")  # left out by default
BROUGHT_UP = ("slurm", "vllm")  # take what somebody must bring up
DEFAULT = f"not ({' or '.join([*BROUGHT_UP, *KINDS])})"  # pyproject.toml's
COLLECTED = pytest.StashKey[list[pytest.Item]]()
SHARE = 5  # of how many families one is tried by default, by each test that goes through them
FEW = 8  # as many families as that are all tried
T = TypeVar("T")


def covering(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Some of the cases, by number, in which every value of every parameter stands as often as it must: once.

    Each step takes the case with the most values that no case has yet; between equals, the one whose pairs of values
    are the newest, and then the first one.
    """
    values = [set(case.items()) for case in cases]
    pairs = [set(map(frozenset, combinations(case.items(), 2))) for case in cases]
    values_left, pairs_left = set().union(*values), set().union(*pairs)
    taken: list[int] = []
    while values_left:
        gains = [(len(values[i] & values_left), len(pairs[i] & pairs_left), -i) for i in range(len(cases))]
        best = -max(gains)[2]
        values_left -= values[best]
        pairs_left -= pairs[best]
        taken.append(best)
    return taken


def share(test: str, values: Iterable[Hashable], size: int = SHARE) -> list[Hashable]:
    """One of `size` values, evenly spread, beginning where the test's name says."""
    values = list(values)
    return values if len(values) <= FEW else values[zlib.crc32(test.encode()) % size :: size]


def mark(items: Iterable[pytest.Item]) -> None:
    """Gives each case that is left out by default its kind."""
    of_test: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            of_test[item.nodeid.partition("[")[0]].append(item)
    for test, cases in of_test.items():
        cases = _left_by_families(test, _left_by_many(cases))
        kept = covering([dict(enumerate(case.callspec._idlist)) for case in cases])
        for number, case in enumerate(cases):
            if number not in kept:
                case.add_marker(pytest.mark.product)


def spread(cases: Sequence[T], number: int) -> list[T]:
    """So many of the cases, the first one and others as far apart as they can be."""
    return [cases[len(cases) * i // number] for i in range(min(number, len(cases)))]


def _left_by_many(cases: list[pytest.Function]) -> list[pytest.Function]:
    """The cases that are tried by default of a test that says how many; the others get their kind."""
    marker = cases[0].get_closest_marker("tries")
    chosen = spread(cases, *marker.args) if marker else cases
    for case in cases:
        if case not in chosen:
            case.add_marker(pytest.mark.many)
    return chosen


def _left_by_families(test: str, cases: list[pytest.Function]) -> list[pytest.Function]:
    """The cases of the families that are tried by default; the others get their kind."""
    if any(case.get_closest_marker("every_family") for case in cases):
        return cases
    families = dict.fromkeys(case.callspec.params.get("family") for case in cases)
    chosen = share(test, families)
    for case in cases:
        if case.callspec.params.get("family") not in chosen:
            case.add_marker(pytest.mark.families)
    return [case for case in cases if case.callspec.params.get("family") in chosen]


def long_files_first(items: list[pytest.Item]) -> None:
    """Files that start processes come first, so that no worker is left alone with one of them in the end."""
    begin = {"subprocess", "forks", "start", "launch", "launch_anew"}
    items.sort(key=lambda item: begin.isdisjoint(vars(getattr(item, "module", object))))


def all_of_what_is_named(config: pytest.Config) -> None:
    """A test that is named by its function runs whole: leaving its cases out would be a surprise."""
    if config.option.markexpr == DEFAULT and any("::" in argument for argument in config.args):
        config.option.markexpr = "not slurm"
