"""A table of raw values by column, the text of each value, and the cells that are ahead of all others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from esparse.errors import Mistake
from esparse.reports.reading import NUMBER

IDS = "ids"  # beside the columns of a row that stands for several runs: which these are
SAME = ("model", "pattern", "outliers")  # what two runs must have in common for one to be ahead of the other


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds and its sample standard deviation (None for a single run)."""

    mean: float
    deviation: float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Raw values by column: `asked` columns hold settings, `measured` columns results."""

    asked: list[str]
    measured: list[str]
    rows: list[dict[str, Any]]
    like: dict[str, str] = field(default_factory=dict)  # columns that are written as another one is
    stands: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a pivoted table: the meaning of a column
    chosen: list[str] = field(default_factory=list)  # the columns to show; empty: all

    def choose(self, columns: Sequence[str]) -> Table:
        """The table with only these columns, in this order; raises ValueError for an unknown column."""
        for column in columns:
            if column not in self.columns:
                raise Mistake(f"no column {column!r} to show; there is {', '.join(self.columns)}")
        return replace(self, chosen=list(columns))

    def shown(self) -> tuple[list[str], list[str]]:
        """The columns that one line can say for all runs, and those that the table has."""
        shared = [column for column in self.shared() if column not in self.chosen]
        return shared, self.chosen or [column for column in self.columns if column not in shared]

    def best(self) -> set[tuple[int, str]]:
        """The cells (row, column) that are ahead of all others of the same model, pattern and measurement.

        The lowest perplexity or error and the highest score of a task; several if their texts are equal, none if all
        texts are.
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
        """Columns with the same value in all runs, which one line can show."""

        def sayable(column: str) -> bool:
            dense = column == "density" or column.endswith(" dense")
            return (column in self.asked and column not in ("id", "runs")) or (dense and len(self.rows) > 1)

        return [c for c in self.columns if sayable(c) and len({exact(row.get(c)) for row in self.rows}) == 1]


def ids_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The runs that these rows stand for."""
    return list(dict.fromkeys(i for row in rows for i in row.get(IDS) or ([row["id"]] if "id" in row else [])))


def cells(table: Table) -> tuple[str, list[str], list[bool], list[list[str]]]:
    """The line of what all runs share, and the header, right alignment and texts of what differs."""
    shared, columns = table.shown()
    right = [all(isinstance(r.get(c), (*NUMBER, Spread, type(None))) for r in table.rows) for c in columns]
    in_common = ", ".join(f"{column} {table.text(column, table.rows[0].get(column))}" for column in shared)
    line = f"{'All runs' if len(table.rows) > 1 else 'Run'}: {in_common}" if in_common else ""
    return line, columns, right, [[table.text(c, row.get(c)) for c in columns] for row in table.rows]


def spread(values: list[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Spread(mean, None)
    # hypot, as the square of a broken model's perplexity (up to e^700) is more than a float holds.
    return Spread(mean, math.hypot(*(v - mean for v in values)) / math.sqrt(len(values) - 1))


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there; None if none is."""
    of_all = spread([value for value in values if value is not None])
    return None if of_all is None else of_all.mean


def _better(column: str) -> int:
    """1 if higher is better, -1 if lower is, 0 if neither: kept scores of two metrics cannot be compared."""
    if " ppl " in column or column == "error" or column.endswith(" ratio"):
        return -1 if not column.endswith(" dense") else 0
    return 1 if column.endswith(" pruned") else 0


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
        return " ".join(value.split()) if isinstance(value, str) else json.dumps(value)  # a cell is one line
    if isinstance(value, int) and column not in ("seconds", "error", "kept", "bits") and " " not in column:
        return str(value)
    if column in ("error", "kept"):
        return f"{value:.4f}"
    if column == "bits":
        return f"{value:.3f}"
    if column == "seconds":
        return f"{value:.1f}"
    if column.endswith(" MiB"):
        return f"{value:.0f}"
    if " ppl " in column:
        return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.2e}"
    if column.endswith(" ratio"):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1e6 else f"{value:.2e}"
    return f"{value:.4f}" if column.endswith((" dense", " pruned")) else f"{value:g}"
