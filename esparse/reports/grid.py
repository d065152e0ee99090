"""Run records as columns: what was asked, what was measured, and which of both differ between runs.

A column per choice (metric, shuffle, ...), per setting in which runs of the same choice differ (metric.alpha)
and per measurement. Computed here: ratio = pruned / dense perplexity, means over tasks, means over layers (error =
||X (W - W')^T||_F / ||X W^T||_F, kept = surviving share of the score), and mean and sample standard deviation over
seeds.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esparse.records.report import NOT_IDENTITY, asks_for_nothing

Record = dict[str, Any]

NUMBER = (int, float)
# What a table needs of a record, and its type.
NEEDED: dict[str, Any] = {
    "id": str,
    "config": dict,
    "model.name": str,
    "sparsity.pattern": str,
    "sparsity.density": NUMBER,
    "quality": dict,
    "seconds": NUMBER,
}
METHOD = ("metric", "shuffle", "update", "recovery")
MEASURING = {
    "model",
    "evaluate",
    "zeroshot",
    "bench",
    "export",
    "tracking",
}  # choices that have columns of their own
# Settings that are not worth a column: they change no measurement here, or have a column already.
HIDDEN = NOT_IDENTITY | {"pattern", "outliers", "seed", "name", "dry_run", "profile", "bench", "export", "hydra"}
HIDDEN |= {"model.name", "evaluate.corpora", "zeroshot.tasks"}


SAME = ("model", "pattern", "outliers")  # what two runs must have in common for one to be ahead of the other

# Measures of a task that are shares of its questions, so that a mean over tasks means something.
SHARES = ("acc", "acc_norm", "exact_match")


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds and its sample standard deviation (None for a single run)."""

    mean: float
    deviation: float | None


@dataclass(frozen=True, slots=True)
class Grid:
    """Raw values by column: `asked` columns say what a run was, `measured` ones what came out."""

    asked: list[str]
    measured: list[str]
    rows: list[dict[str, Any]]
    like: dict[str, str] = field(default_factory=dict)  # columns that are written as another one is
    stands: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a turned table: what a column stands for
    chosen: list[str] = field(default_factory=list)  # the columns to show, where some were asked for

    def choose(self, columns: Sequence[str]) -> Grid:
        """The table with these columns alone, in this order; ValueError for one that is not there."""
        for column in columns:
            if column not in self.columns:
                raise ValueError(f"no column {column!r} to show; there is {', '.join(self.columns)}")
        return replace(self, chosen=list(columns))

    def shown(self) -> tuple[list[str], list[str]]:
        """The columns that one line can say for all runs, and those that the table has."""
        shared = [column for column in self.shared() if column not in self.chosen]
        return shared, self.chosen or [column for column in self.columns if column not in shared]

    def best(self) -> set[tuple[int, str]]:
        """The cells (row, column) that are ahead of all others of the same model, pattern and measurement.

        The lowest perplexity or error and the highest score of a task; several where they are written alike, none where
        all are.
        """
        rivals: dict[str, dict[tuple[int, str], float]] = {}
        for i, row in enumerate(self.rows):
            for column in self.measured:
                value, sign = row.get(column), _better(self.like.get(column, column))
                value = value.mean if isinstance(value, Spread) else value
                if sign and value is not None and not math.isnan(value):
                    of_same = row | self.stands.get(column, {})
                    key = exact([self.like.get(column, column), *(of_same.get(c) for c in SAME)])
                    rivals.setdefault(key, {})[i, column] = sign * value
        found = set()
        for of_key in rivals.values():
            i, column = max(of_key, key=lambda cell: of_key[cell])
            ahead = self._mean_text(i, column)
            alike = {cell for cell in of_key if self._mean_text(*cell) == ahead}
            found |= alike if len(alike) < len(of_key) else set()
        return found

    def _mean_text(self, row: int, column: str) -> str:
        value = self.rows[row][column]
        return self.text(column, value.mean if isinstance(value, Spread) else value)

    def text(self, column: str, value: Any) -> str:
        """A value as this column shows it."""
        return text(self.like.get(column, column), value)

    @property
    def columns(self) -> list[str]:
        """All columns in which some run has a value."""
        return [
            column for column in self.asked + self.measured if any(row.get(column) is not None for row in self.rows)
        ]

    def shared(self) -> list[str]:
        """Columns whose value all runs have in common and that one line can say for all of them."""

        def sayable(column: str) -> bool:
            dense = column == "density" or column.endswith(" dense")
            return (column in self.asked and column not in ("id", "runs")) or (dense and len(self.rows) > 1)

        return [c for c in self.columns if sayable(c) and len({exact(row.get(c)) for row in self.rows}) == 1]


def read_records(root: Path) -> list[Record]:
    """All finished records below `root`, each with its `folder`; a damaged one is named on stderr and left out."""
    records = []
    for path in sorted(root.rglob("result.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            fault = _fault(record)
        except ValueError:
            fault = "it is not whole JSON"
        except OSError as error:
            fault = error.strerror or type(error).__name__
        if fault:
            print(f"esparse: {path} is left out: {fault}", file=sys.stderr)
        else:
            records.append(record | {"folder": path.parent})
    return records


def _fault(record: Any) -> str | None:
    """What a table misses in a record, or None."""
    if not isinstance(record, dict):
        return "it is not a record"
    if record.get("status", "finished") != "finished":
        return f"its status is {record['status']!r}"
    for path, kind in NEEDED.items():
        if not isinstance(_at(record, path), kind):
            return f"its field {path} is missing or not what it should be"
    for part, kind in (("layers", list), ("memory", dict), ("zeroshot", dict)):
        if not isinstance(record.get(part, kind()), kind):
            return f"its field {part} is not what it should be"
    tests = [("quality", record["quality"]), ("zeroshot", record.get("zeroshot", {}))]
    for part, values in tests:
        for name, value in values.items():
            for which in ("dense", "pruned"):
                if not isinstance(value, dict) or not isinstance(value.get(which, ""), (*NUMBER, type(None))):
                    return f"its field {part}.{name}.{which} is missing or not a number"
    if not all(isinstance(layer, dict) for layer in record.get("layers", [])):
        return "its field layers is not what it should be"
    return None


def _at(record: Any, path: str) -> Any:
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def grid(records: Sequence[Record], *, corpus: str | None = None, sort: str | None = None) -> Grid:
    """The columns of these records, in an order to read; perplexities of one corpus, or of all.

    Raises ValueError for a corpus that no run was measured on, or a column to sort by that is not there.
    """
    corpora = keys(records, "quality")
    if corpus is not None and corpus not in corpora:
        raise ValueError(f"no run was measured on {corpus!r}; there is {', '.join(corpora) or 'nothing'}")
    corpora = corpora if corpus is None else [corpus]
    common = _common_tasks(records)
    rows = [_asked(record) | _measured(record, corpora, common) for record in records]
    others = sorted({group for record in records for group in _choices(record)} - MEASURING - set(METHOD))
    asked = ["model", *METHOD, *[g for g in others if "/" not in g], "pattern", "outliers", "seed"]
    for path in _differing(records):
        values = [leaves(record["config"]).get(path) for record in records]
        # A setting that follows the seed, as ${seed} does, says nothing new.
        if not any([exact(row.get(c)) for row in rows] == [exact(v) for v in values] for c in asked):
            asked.insert(-1, path)
            for row, value in zip(rows, values, strict=True):
                row[path] = value
    measured = list(dict.fromkeys(key for row in rows for key in row if key not in asked and key != "id"))
    table = Grid(["id", *asked], sorted(measured, key=_place(corpora)), rows)
    if sort is not None and sort not in table.columns:
        raise ValueError(f"no column {sort!r} to sort by; there is {', '.join(table.columns)}")
    order = ["model", "pattern", *asked, "id"] if sort is None else [sort]
    rows.sort(key=lambda row: [natural(row.get(column)) for column in order])
    return table


def _asked(record: Record) -> dict[str, Any]:
    config = record["config"]
    return {
        "id": record["id"],
        **{group: option for group, option in _choices(record).items() if group not in MEASURING},
        "model": record["model"]["name"],
        "pattern": record["sparsity"]["pattern"],
        "outliers": config.get("outliers"),
        "seed": config.get("seed"),
    }


def _choices(record: Record) -> dict[str, str]:
    """The option chosen in each group; its class where a record does not say."""
    config = record["config"]
    classes = {g: config[g]["_class"] for g in METHOD if _at(config, f"{g}._class") is not None}
    return classes | (config.get("choices") or {})


def _common_tasks(records: Sequence[Record]) -> list[str]:
    """The tasks that all runs with tasks have in common, with an accuracy: of others a mean says nothing."""
    with_tasks = [record["zeroshot"] for record in records if record.get("zeroshot")]

    def has(tasks: Record, task: str) -> bool:
        return task in tasks and tasks[task].get("score", "acc") in SHARES

    return [task for task in keys(records, "zeroshot") if all(has(tasks, task) for tasks in with_tasks)]


def _measured(record: Record, corpora: list[str], tasks: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"density": record["sparsity"]["density"]}
    for corpus in corpora:
        dense, pruned = (_at(record, "quality").get(corpus, {}).get(which) for which in ("dense", "pruned"))
        row[f"{corpus} ppl dense"], row[f"{corpus} ppl pruned"] = dense, pruned
        row[f"{corpus} ratio"] = pruned / dense if dense and pruned is not None else None
    for task, value in record.get("zeroshot", {}).items():
        row[f"{task} dense"], row[f"{task} pruned"] = value["dense"], value["pruned"]
    if len(tasks) > 1 and record.get("zeroshot"):
        for which in ("dense", "pruned"):
            row[f"mean of tasks {which}"] = _mean(record["zeroshot"][task][which] for task in tasks)
    layers, memory = record.get("layers", []), record.get("memory", {})
    row["error"] = _mean(layer.get("relative_error") for layer in layers)
    row["kept"] = _mean(layer.get("kept_score") for layer in layers)
    row["seconds"] = record["seconds"]
    row["host MiB"], row["device MiB"] = memory.get("peak_host_mib"), memory.get("peak_device_mib")
    return row


def profiles(records: Sequence[Record]) -> Grid:
    """The profiles of all runs that have one: a row per layer, input of a layer or attention head.

    Raises ValueError where no run has one.
    """
    rows = [
        {"id": record["id"], "model": record["model"]["name"], "pattern": record["sparsity"]["pattern"]} | row
        for record in records
        for row in (record.get("profile") or {}).get("rows", [])
    ]
    if not rows:
        raise ValueError("no run has a profile: run it with profile=true")
    asked = ["id", "model", "pattern", "kind", "name", "head"]
    measured = list(dict.fromkeys(key for row in rows for key in row if key not in (*asked, "values")))
    return Grid([*asked, "values"], measured, rows, like=dict.fromkeys(measured, "share pruned"))


def _differing(records: Sequence[Record]) -> list[str]:
    """Settings that two runs of the same choice have differently, as paths like metric.alpha."""
    seen: dict[str, dict[str, set[str]]] = {}
    for record in records:
        choices = _choices(record) | {"model": record["model"]["name"]}
        for path, value in leaves(record["config"]).items():
            chosen = choices.get(path.partition(".")[0], "")
            seen.setdefault(path, {}).setdefault(chosen, set()).add(exact(value))
    return [path for path, by_choice in seen.items() if max(map(len, by_choice.values())) > 1]


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that tell runs apart, by path: {"metric.alpha": 1.0}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path in HIDDEN or key.startswith("_") or asks_for_nothing(path, value):
            continue
        found |= leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def _place(corpora: list[str]) -> Any:
    """Density, perplexities, tasks, then what the run cost."""
    first = ["density", *[f"{c} {what}" for c in corpora for what in ("ppl dense", "ppl pruned", "ratio")]]
    last = ["error", "kept", "seconds", "host MiB", "device MiB"]
    places = {c: i for i, c in enumerate(first)} | {c: len(first) + 1 + i for i, c in enumerate(last)}
    return lambda column: places.get(column, len(first))


def means(table: Grid) -> Grid:
    """The runs that differ by nothing but seeds as one row each: `Spread` values, and how many runs."""
    asked = [c for c in table.asked if c not in ("id", "seed") and not c.endswith(".seed")]
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in table.rows:
        alike.setdefault(tuple(exact(row.get(c)) for c in asked), []).append(row)
    rows = []
    for runs in alike.values():
        values = {c: [run[c] for run in runs if run.get(c) is not None] for c in table.measured}
        same: dict[str, Any] = {c: runs[0].get(c) for c in asked} | {"runs": len(runs)}
        rows.append(same | {column: spread(of_runs) for column, of_runs in values.items()})
    return Grid([*asked, "runs"], table.measured, rows)


def cells(table: Grid) -> tuple[str, list[str], list[bool], list[list[str]]]:
    """The line of what all runs share, and the header, right alignment and texts of what differs."""
    shared, columns = table.shown()
    right = [all(isinstance(r.get(c), (*NUMBER, Spread, type(None))) for r in table.rows) for c in columns]
    said = ", ".join(f"{column} {table.text(column, table.rows[0].get(column))}" for column in shared)
    line = f"{'All runs' if len(table.rows) > 1 else 'Run'}: {said}" if said else ""
    return line, columns, right, [[table.text(c, row.get(c)) for c in columns] for row in table.rows]


def spread(values: list[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Spread(mean, None)
    return Spread(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))


def _mean(values: Iterable[float | None]) -> float | None:
    of_all = spread([value for value in values if value is not None])
    return None if of_all is None else of_all.mean


def _better(column: str) -> int:
    """1 where more of it is better, -1 where less is, 0 where it says nothing: a kept score is the metric's own."""
    if " ppl " in column or column == "error" or column.endswith(" ratio"):
        return -1 if not column.endswith(" dense") else 0
    return 1 if column.endswith(" pruned") else 0


def keys(records: Sequence[Record], field: str) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record.get(field, {})))


def exact(value: Any) -> str:
    if isinstance(value, Spread):
        return f"{value.mean} {value.deviation or None}"  # as text() shows it: no deviation is not said
    return json.dumps(value, sort_keys=True)


def natural(value: Any) -> tuple[Any, ...]:
    """Sorts numbers by size, text by its words and numbers (2:4 before 16:32), nothing last."""
    if value is None:
        return (2,)
    if isinstance(value, NUMBER):
        return (0, math.isnan(value), value)
    parts = re.split(r"(\d+)", value if isinstance(value, str) else exact(value))
    return (1, [(int(part), "") if part.isdigit() else (-1, part) for part in parts])


def text(column: str, value: Any) -> str:
    """A value as a table shows it: two decimals of a perplexity, four of a share."""
    if isinstance(value, Spread):
        deviation = text(column, value.deviation) if value.deviation else ""
        # What rounds to nothing is not said: 21.81, not 21.81 ± 0.00.
        return text(column, value.mean) + (f" ± {deviation}" if deviation.strip("0.") else "")
    if value is None:
        return ""
    if not isinstance(value, NUMBER) or isinstance(value, bool):
        return value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, int) and column not in ("seconds", "error", "kept") and " " not in column:
        return str(value)
    if column in ("error", "kept"):
        return f"{value:.4f}"
    if column == "seconds":
        return f"{value:.1f}"
    if column.endswith(" MiB"):
        return f"{value:.0f}"
    if " ppl " in column:
        return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.2e}"
    if column.endswith(" ratio"):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1e6 else f"{value:.2e}"
    return f"{value:.4f}" if column.endswith((" dense", " pruned")) else f"{value:g}"
