"""Published numbers beside hand-made records."""

from __future__ import annotations

from csv import DictReader
from pathlib import Path
from typing import Any

import pytest

from esparse.records.groups import METHOD_GROUPS
from esparse.reports.literature import CONFIDENCE, DENSE, NUMBERS, Published, beside, main, read
from tests import forks
from tests.reports.test_tables import record, write

WANDA = Published(
    model="tiny",
    pattern="2:4",
    prepare="",
    metric="wanda",
    shuffle="",
    update="",
    recovery="",
    measure="builtin",
    length=5,
    value=14.0,
    confidence="read",
    source="a paper",
)


def like(number: Published, **other: Any) -> Published:
    return Published(**({f: getattr(number, f) for f in Published.__dataclass_fields__} | other))


def rows(records: list[dict[str, Any]], *numbers: Published) -> list[dict[str, Any]]:
    return beside(records, numbers).rows


def test_by_hand() -> None:
    (row,) = rows([record("a", pruned=15.0), record("b", seed=1, pruned=17.0)], WANDA)
    assert (row["measured"].mean, row["published"], row["difference"], row["runs"]) == (16.0, 14.0, 2.0, 2)
    assert row["measured"].deviation == pytest.approx(2**0.5)
    assert (row["window"], row["sure"], row["source"]) == (5, "read", "a paper")


@pytest.mark.parametrize(
    "other",
    [
        {"model": "small"},
        {"pattern": "4:8"},
        {"pattern": "2:4+16:256"},
        {"metric": "entropy"},
        {"metric": ""},
        {"shuffle": "gns"},
        {"update": "obs"},
        {"recovery": "window"},
        {"prepare": "equalise"},
        {"measure": "wikitext2"},
        {"length": 6},
    ],
    ids=str,
)
def test_another_method_text_or_length_is_not_compared(other: dict[str, Any]) -> None:
    assert not rows([record()], like(WANDA, **other))


def test_what_a_source_does_not_say_may_be_anything() -> None:
    assert rows([record(metric="ria")], like(WANDA, metric="any"))


def test_runs_of_other_settings_stand_apart() -> None:
    found = rows([record("a", metric="entropy", alpha=1.0), record("b", metric="entropy", alpha=2.0)], ENTROPY)
    assert [row["runs"] for row in found] == [1, 1]


ENTROPY = like(WANDA, metric="entropy")


def test_the_dense_model_is_one_whatever_the_method() -> None:
    (row,) = rows([record("a"), record("b", metric="ria")], like(WANDA, pattern=DENSE, metric="", value=9.5))
    assert (row["measured"].mean, row["difference"], row["runs"], row["run"]) == (10.0, 0.5, 1, "tiny dense")


def test_accuracies_are_in_per_cent() -> None:
    one = record() | {"zeroshot": {"piqa": {"dense": 0.75, "pruned": 0.5, "stderr": 0.01, "n": 4}}}
    (row,) = rows([one], like(WANDA, measure="piqa", length=None, value=48.0))
    assert (row["measured"].mean, row["difference"]) == (50.0, 2.0)


def test_outliers_belong_to_the_pattern() -> None:
    one = record()
    one["config"]["outliers"] = "16:256"
    assert rows([one], like(WANDA, pattern="2:4+16:256")) and not rows([one], WANDA)


@pytest.mark.parametrize(
    ("part", "counts"),
    [
        ({"choices": {"metric": "wanda", "allocation": "uniform"}}, True),
        ({"choices": {"metric": "wanda", "allocation": "owl"}}, False),
        ({"model": {"skip": ["lm_head"]}}, False),
    ],
)
def test_what_a_paper_did_not_do_is_not_beside_its_number(part: dict[str, Any], counts: bool) -> None:
    run = record("a", pruned=15.0)
    run["config"] = run["config"] | part
    assert bool(rows([run], WANDA)) == counts


@pytest.mark.parametrize(
    ("evaluate", "counts"),
    [
        ({"max_tokens": None}, True),
        ({"max_tokens": 15}, True),
        ({"max_tokens": 14}, False),
        ({"max_tokens": 10}, False),
    ],
)
def test_the_beginning_of_a_text_is_another_text(evaluate: dict[str, Any], counts: bool) -> None:
    run = record("a", pruned=15.0)  # 10 tokens in windows of 5
    run["config"] = run["config"] | {"evaluate": evaluate}
    assert bool(rows([run], WANDA)) == counts


@pytest.mark.parametrize(
    ("zeroshot", "score", "counts"),
    [
        ({"limit": None, "shots": None}, "acc", True),
        ({"limit": 5, "shots": 0}, "acc", True),
        ({"limit": 4, "shots": None}, "acc", False),
        ({"limit": None, "shots": 5}, "acc", False),
        ({"limit": None, "shots": None}, "acc_norm", False),
    ],
)
def test_some_questions_or_another_measure_are_another_task(zeroshot: dict[str, Any], score: str, counts: bool) -> None:
    run = record() | {"zeroshot": {"piqa": {"dense": 0.75, "pruned": 0.5, "stderr": 0.01, "n": 4, "score": score}}}
    run["config"] = run["config"] | {"zeroshot": {"tasks": ["piqa"]} | zeroshot}
    assert bool(rows([run], like(WANDA, measure="piqa", length=None))) == counts


@pytest.mark.parametrize("group", METHOD_GROUPS)
def test_every_part_of_the_method_counts(group: str) -> None:
    run = record("a", pruned=15.0)
    run["config"] = run["config"] | {"choices": run["config"]["choices"] | {group: "another"}}
    assert not rows([run], WANDA)


def test_the_numbers_that_ship_can_be_read_and_asked_for() -> None:
    numbers = read()
    assert len(numbers) == sum(1 for _ in DictReader(NUMBERS.open())) > 100
    conf = Path(__file__).parents[2] / "conf"
    for number in numbers:
        assert number.source and number.confidence in CONFIDENCE
        assert (conf / "model" / f"{number.model}.yaml").exists(), number.model
        for group in METHOD_GROUPS:
            option = getattr(number, group, "")
            assert option in ("", "any") or (conf / group / f"{option}.yaml").exists(), option


def test_as_a_process(tmp_path: Path) -> None:
    def command(*words: object) -> tuple[int, str, str]:
        done = forks.run("-m", "esparse.published", *words)
        return done.returncode, done.stdout, done.stderr

    write(tmp_path, record())
    numbers = tmp_path / "numbers.csv"
    fields = list(Published.__dataclass_fields__)
    values = [str(getattr(WANDA, field)) for field in fields]
    numbers.write_text(f"{','.join(fields)}\n{','.join(values)}\n")
    code, out, err = command(tmp_path, "--numbers", numbers)
    assert (code, err) == (0, "")
    row = [cell.strip() for cell in out.splitlines()[-1].strip("| ").split("|")]
    assert row == ["tiny", "builtin", "5", "1", "15.00", "14.00", "1.00", "read", "a paper"]
    code, out, err = command(tmp_path)
    assert (code, out) == (1, "") and err.startswith("esparse: none of the 1 runs in ")
    numbers.write_text(f"{','.join(fields)}\n{','.join([*values[:-3], 'many', *values[-2:]])}\n")
    code, out, err = command(tmp_path, "--numbers", numbers)
    assert code == 2 and f"{numbers}, line 2" in err


@pytest.mark.parametrize(("name", "said"), [("no.csv", "No such file"), ("", "Is a directory"), ("raw", "no CSV")])
def test_numbers_that_cannot_be_read(name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").write_bytes(b"\xd0\x00")
    assert main([str(tmp_path), "--numbers", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"esparse: --numbers {tmp_path / name} ") and said in err
