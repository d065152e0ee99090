"""Pivots a table: one column for each value of some columns, with one measurement in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esparse.errors import Mistake
from esparse.reports.table import IDS, Table, exact, ids_of, natural, text


def pivot(table: Table, across: Sequence[str], value: str | None = None) -> Table:
    """One row for each combination of the other columns, and the `value` of each combination of `across` as a column.

    `value`: default is the first corpus's pruned perplexity. Raises ValueError for columns that the table lacks.
    """
    value = known(table, across, value)
    comparable(value, across)
    down = [c for c in table.asked if c not in (*across, "id", "runs")]
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    names: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        name = ", ".join(text(c, row.get(c)) or "-" for c in across)
        names.setdefault(name, {c: row.get(c) for c in across})
        key = tuple(exact(row.get(c)) for c in down)
        turned = rows.setdefault(key, {c: row.get(c) for c in down})
        turned |= {name: row.get(value), IDS: ids_of([turned, row])}
    columns = sorted(names, key=lambda name: [natural(names[name][c]) for c in across])
    return Table(down, columns, list(rows.values()), like=dict.fromkeys(columns, value), stands=names)


def known(table: Table, columns: Sequence[str], value: str | None) -> str:
    """The measured column `value`, or the first pruned perplexity; raises ValueError if a column is missing."""
    value = value or next((c for c in table.columns if c.endswith(" ppl pruned")), "")
    for column, allowed in [*((c, table.asked) for c in columns), (value, table.measured)]:
        if column not in allowed or column not in table.columns:
            found = ", ".join(c for c in allowed if c in table.columns and c not in ("id", "runs"))
            raise Mistake(f"no column {column!r}; there is {found or 'nothing'}")
    return value


def comparable(value: str, columns: Sequence[str]) -> None:
    """Raises ValueError if kept scores were to be compared between metrics."""
    if value == "kept" and any(c == "metric" or c.startswith("metric.") for c in columns):
        raise Mistake("a kept score is a share of the metric's own score: those of two metrics cannot be compared")
