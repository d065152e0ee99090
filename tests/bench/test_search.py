"""The search for an algorithm with a child of the test's own: what is kept, repeated, and survived."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esparse.bench import search
from esparse.bench.products import Case
from esparse.bench.search import ATTEMPTS, Algorithms, run_child
from esparse.kernels.linear import Algorithm
from esparse.patterns import NM

FIRST = Case(64, 4096, 4096, "bfloat16", NM(2, 4))
SECOND = Case(64, 11008, 4096, "bfloat16", NM(2, 4))


def algorithms(tmp_path: Path, gpu: str = "A GPU", library: str = "0.8.1") -> Algorithms:
    return Algorithms(tmp_path / "cache" / "algorithms.json", gpu, library)


def trying(case: int, alg_id: int) -> dict[str, Any]:
    return {"case": case, "trying": Algorithm(alg_id)._asdict()}


def found(case: int, alg_id: int) -> dict[str, Any]:
    return {"case": case, "found": {"algorithm": Algorithm(alg_id, 2, 1)._asdict(), "ms": 0.5}}


def test_what_was_found_is_kept_and_not_searched_again(tmp_path: Path) -> None:
    asked = []

    def child(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        asked.append(cases)
        yield from (trying(0, 3), found(0, 3), trying(1, 4), found(1, 4))

    algorithms(tmp_path).search([FIRST, SECOND, FIRST], child)
    assert [len(cases) for cases in asked] == [2]
    assert asked[0][1] == {"tokens": 64, "rows": 11008, "inputs": 4096, "dtype": "bfloat16", "banned": []}
    again = algorithms(tmp_path)
    again.search([FIRST, SECOND], child)
    assert len(asked) == 1
    assert again.get(FIRST) == Algorithm(3, 2, 1) and again.get(SECOND) == Algorithm(4, 2, 1)


@pytest.mark.parametrize("other", [{"gpu": "B GPU"}, {"library": "0.8.0"}])
def test_another_gpu_or_library_is_another_entry(tmp_path: Path, other: dict[str, str]) -> None:
    algorithms(tmp_path).put(FIRST, found(0, 3)["found"])
    assert algorithms(tmp_path, **other).get(FIRST) is None
    assert not algorithms(tmp_path, **other).known(FIRST)
    for changed in ({"tokens": 72}, {"rows": 16}, {"inputs": 16}, {"dtype": "float16"}):
        assert not algorithms(tmp_path).known(dataclasses.replace(FIRST, **changed))


def test_an_algorithm_that_ends_the_process_is_left_out(tmp_path: Path) -> None:
    asked = []

    def child(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        asked.append(cases)
        banned = [algorithm["alg_id"] for algorithm in cases[0]["banned"]]
        if len(cases) == 2 and not banned:
            yield from (trying(0, 1), found(0, 1), trying(1, 6))  # and dies
        elif banned == [6]:
            yield from (trying(0, 7), found(0, 7))
        else:
            yield trying(0, 6)

    algorithms(tmp_path).search([FIRST, SECOND], child)
    assert [len(cases) for cases in asked] == [2, 1]
    assert algorithms(tmp_path).get(SECOND) == Algorithm(7, 2, 1)
    written = json.loads(algorithms(tmp_path).path.read_text())
    assert written[algorithms(tmp_path).key(SECOND)]["ended_the_process"] == [Algorithm(6)._asdict()]


def test_a_case_that_ends_every_process_is_given_up(tmp_path: Path) -> None:
    started = []

    def child(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        started.append(cases)
        yield trying(0, len(started))

    algorithms(tmp_path).search([FIRST], child)
    assert len(started) == ATTEMPTS
    assert algorithms(tmp_path).get(FIRST) is None and algorithms(tmp_path).known(FIRST)


def test_a_child_that_cannot_begin_is_not_asked_for_ever(tmp_path: Path) -> None:
    algorithms(tmp_path).search([FIRST], lambda cases: (event for event in ()))
    assert not algorithms(tmp_path).known(FIRST)


def test_a_damaged_cache_counts_as_empty(tmp_path: Path) -> None:
    cache = algorithms(tmp_path)
    cache.path.parent.mkdir()
    cache.path.write_text('{"half')
    assert cache.get(FIRST) is None
    cache.put(FIRST, found(0, 3)["found"])
    assert cache.get(FIRST) == Algorithm(3, 2, 1)


@pytest.mark.slow
def test_a_child_that_falls_silent_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    code = 'import sys, time; sys.stdin.read(); print(\'noise\\n{"case": 0, "found": {}}\', flush=True); time.sleep(60)'
    popen = search.subprocess.Popen

    def instead(command: list[str], **kwargs: Any) -> Any:
        return popen([command[0], "-c", code], **kwargs)

    monkeypatch.setattr(search.subprocess, "Popen", instead)
    assert list(run_child([{}], quiet_s=2)) == [{"case": 0, "found": {}}]


def test_tokens_that_are_padded_alike_are_one_entry(tmp_path: Path) -> None:
    asked = []

    def child(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        asked.append(cases)
        yield from (trying(0, 3), found(0, 3))

    cases = [dataclasses.replace(FIRST, tokens=tokens) for tokens in (1, 4, 8)]
    algorithms(tmp_path).search(cases, child)
    assert [len(cases) for cases in asked] == [1]
    assert all(algorithms(tmp_path).get(case) == Algorithm(3, 2, 1) for case in cases)
