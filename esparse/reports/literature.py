"""Compares measured with published numbers: `python -m esparse.published OUTPUT_ROOT`.

assets/published.csv has what papers and repositories printed, each number with its source and with how sure it is: read
there (`read`), read in another source (`secondary`), or remembered (`recalled`). A published number is compared with
runs of the same model, pattern, method, text and window length, whatever their calibration text. A run that measured
only the beginning of a text or the first questions of a task, gave examples in front of them, or took another measure
than the accuracy is not compared. The two are never mixed: a published number is in no other table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from csv import DictReader
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esparse.errors import Mistake
from esparse.records.groups import METHOD_GROUPS, acts
from esparse.reports.reading import Record, at, read_records, stop
from esparse.reports.table import Table, exact, natural, spread
from esparse.reports.tabulate import leaves
from esparse.reports.writing import csv_of, markdown_of

NUMBERS = Path(__file__).parent.parent / "assets" / "published.csv"
DENSE = "dense"
CONFIDENCE = ("read", "secondary", "recalled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One number of one source: a perplexity, or the accuracy of a task in per cent."""

    model: str  # as model.name
    pattern: str  # as on the command line, outliers behind a +; `dense`: of the model as it was
    prepare: str  # option of the group; empty: none; `any`: the source does not say
    metric: str
    shuffle: str
    update: str
    recovery: str
    measure: str  # a corpus, or a zero-shot task
    length: int | None  # tokens of a window; None for tasks
    value: float
    confidence: str
    source: str

    def is_of(self, run: _Run) -> bool:
        """Whether the run measured the same: for a dense number the method does not count."""
        if self.model != run.model or (self.length is not None and self.length != run.lengths.get(self.measure)):
            return False
        if self.pattern == DENSE:
            return True
        return self.pattern == run.pattern and run.whole and all(self._has(group, run) for group in METHOD_GROUPS)

    def _has(self, group: str, run: _Run) -> bool:
        """Whether the run's option of a group is the source's; without a column in the source, the option is `none`."""
        option = run.choices.get(group)
        return getattr(self, group, "") in ("any", option if acts(group, option) else "")


@dataclass(frozen=True, slots=True)
class _Run:
    """The measurements of one record."""

    name: str
    model: str
    pattern: str
    choices: dict[str, str]
    whole: bool  # whether no layer was left dense by model.skip
    settings: str  # what has to be the same for two runs to differ by nothing but a seed
    lengths: dict[str, int]
    values: dict[tuple[str, bool], float]  # by measure, and whether of the dense model


def read(path: Path = NUMBERS) -> list[Published]:
    """The published numbers of a file; raises ValueError, with the line, if one cannot be read."""
    numbers = []
    with path.open(newline="", encoding="utf-8") as lines:
        for line, row in enumerate(DictReader(lines), start=2):
            try:
                length, value = row.pop("length"), float(row.pop("value"))
                numbers.append(Published(**row, length=int(length) if length else None, value=value))
            except (KeyError, TypeError, ValueError) as error:
                raise Mistake(f"{path}, line {line}: {error}") from None
    return numbers


def beside(records: Sequence[Record], numbers: Sequence[Published]) -> Table:
    """A row for each published number and each method that measured it, means over seeds; accuracies in per cent."""
    runs = [_run(record) for record in records]
    rows: list[dict[str, Any]] = []
    for number in numbers:
        dense = number.pattern == DENSE
        alike: dict[str, list[_Run]] = {}
        for run in runs:
            if (number.measure, dense) in run.values and number.is_of(run):
                alike.setdefault("" if dense else run.settings, []).append(run)
        for same in alike.values():
            values = [run.values[number.measure, dense] for run in same]
            if dense:  # measured by some runs, and by others taken over from them
                values = sorted(set(values))
            mean = spread(values)
            assert mean is not None
            rows.append(
                {
                    "run": f"{number.model} {DENSE}" if dense else same[0].name,
                    "measure": number.measure,
                    "window": number.length,
                    "runs": len(values),
                    "measured": mean,
                    "published": number.value,
                    "difference": mean.mean - number.value,
                    "sure": number.confidence,
                    "source": number.source,
                }
            )
    rows.sort(key=lambda row: [natural(row[column]) for column in ("measure", "window", "run", "source")])
    columns = ["run", "measure", "window", "runs", "measured", "published", "difference", "sure", "source"]
    return Table([], columns, rows, like=dict.fromkeys(columns[4:7], "x ppl pruned"))  # two decimals


def _run(record: Record) -> _Run:
    config = record["config"]
    settings = {path: value for path, value in leaves(config).items() if not path.endswith(".seed")}
    pattern = "+".join(filter(None, (record["sparsity"]["pattern"].partition("+")[0], config.get("outliers"))))
    values: dict[tuple[str, bool], float] = {}
    for part, counts in (("quality", _all_of_text), ("zeroshot", _all_of_task)):
        for measure, value in record.get(part, {}).items():
            if not counts(value, config):
                continue
            for which in ("dense", "pruned"):
                if value.get(which) is not None:
                    values[measure, which == "dense"] = value[which] * (100 if part == "zeroshot" else 1)
    return _Run(
        name=record["name"],
        model=record["model"]["name"],
        pattern=pattern,
        choices=config.get("choices") or {},
        whole=not config.get("model", {}).get("skip"),
        settings=exact([record["name"], settings]),
        lengths={corpus: value.get("sequence_length") for corpus, value in record["quality"].items()},
        values=values,
    )


def _all_of_text(quality: Record, config: Record) -> bool:
    """Whether the limit on tokens left nothing of the text out, but for the end that is shorter than a window."""
    limit = at(config, "evaluate.max_tokens")
    return limit is None or quality.get("tokens", 0) + quality.get("sequence_length", 0) <= limit


def _all_of_task(score: Record, config: Record) -> bool:
    """Whether it is the accuracy on all questions of a task, without examples, as papers have it."""
    limit = at(config, "zeroshot.limit")
    asked_all = limit is None or score.get("n", 0) < limit
    return asked_all and not at(config, "zeroshot.shots") and score.get("score", "acc") == "acc"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison; exit code 1 = no records, or none that a published number is of, 2 = a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m esparse.published", description="What was measured beside what was published."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that holds records (result.json) at any depth")
    parser.add_argument("--numbers", type=Path, default=NUMBERS, metavar="FILE", help="published numbers (CSV)")
    parser.add_argument("--format", choices=("markdown", "csv"), default="markdown")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        return stop(f"{options.folder} is not a folder", 2)
    try:
        numbers = read(options.numbers)
    except UnicodeDecodeError:
        return stop(f"--numbers {options.numbers} is no CSV file in UTF-8", 2)
    except OSError as error:
        return stop(f"--numbers {options.numbers} cannot be read: {error.strerror or error}", 2)
    except ValueError as error:
        return stop(str(error), 2)
    records = read_records(options.folder)
    if not records:
        return stop(f"no run has finished in {options.folder} (looked for result.json)", 1)
    table = beside(records, numbers)
    if not table.rows:
        return stop(
            f"none of the {len(records)} runs in {options.folder} measured what one of the {len(numbers)} published "
            "numbers is of: the same model.name, pattern, method, corpus and window length, all of the corpus "
            "(evaluate.max_tokens=null), and of a task the accuracy on all questions (zeroshot.limit=null)",
            1,
        )
    print(markdown_of(table) if options.format == "markdown" else csv_of(table, spread={"measured"}), end="")
    return 0
