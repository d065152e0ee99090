"""Compares, pair by pair, runs that differ in one column only.

A mean over many runs hides a small difference behind other differences (metric, pattern, calibration sample); a
comparison of two runs that are otherwise equal shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esparse.errors import Mistake
from esparse.reports.pivot import comparable, known
from esparse.reports.table import Table, exact, natural, spread, text


def pairs(table: Table, column: str, *, across: Sequence[str] = (), value: str | None = None) -> Table:
    """A row for every two values of a column: in how many pairs of runs the first has less of `value`, and by how much.

    The two runs of a pair have all other columns in common, the seed too; `across` gives rows to each value of those
    columns. Settings of the column's own choice (shuffle.block for shuffle) belong to its value. `value`: default is
    the first corpus's pruned perplexity. Raises ValueError for columns that the table lacks, if no two runs make a
    pair, and for kept scores of two metrics.
    """
    value = known(table, (column, *across), value)
    comparable(value, (column,))
    own = [c for c in table.asked if c.startswith(f"{column}.")]
    same = [c for c in table.asked if c not in ("id", column, *own, *across)]
    names: dict[str, Any] = {}
    alike: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}  # by `across`, by all else, by name
    splits: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in table.rows:
        if row.get(value) is None:
            continue
        # The outliers of `8:16+16:256` have their own column, so that a pair may differ only in them.
        row = row | {"pattern": str(row["pattern"]).removesuffix(f"+{row['outliers']}")}
        settings = [f"{c.removeprefix(f'{column}.')}={text(c, row[c])}" for c in own if row.get(c) is not None]
        name = " ".join([text(column, row.get(column)) or "-", *settings])
        names[name] = row.get(column)
        split = tuple(exact(row.get(c)) for c in across)
        splits[split] = {c: row.get(c) for c in across}
        alike.setdefault(split, {}).setdefault(exact([row.get(c) for c in same]), {})[name] = row[value]
    # `none` is the baseline, so it comes last.
    ordered = sorted(names, key=lambda name: (names[name] in (None, "none"), natural(names[name]), natural(name)))
    rows = []
    for split, shared in sorted(splits.items(), key=lambda item: [natural(v) for v in item[1].values()]):
        for i, first in enumerate(ordered):
            for second in ordered[i + 1 :]:
                both = [of for of in alike[split].values() if first in of and second in of]
                differences = [of[first] - of[second] for of in both]
                if differences:
                    rows.append(
                        shared
                        | {column: first, "against": second, "pairs": len(both)}
                        | {"lower": sum(d < 0 for d in differences), "higher": sum(d > 0 for d in differences)}
                        | {"difference": spread(differences), "least": min(differences), "greatest": max(differences)}
                    )
    if not rows:
        raise Mistake(f"no two runs with a {value!r} differ in {column!r} alone")
    asked, measured = [*across, column, "against"], ["pairs", "lower", "higher", "difference", "least", "greatest"]
    # Shows every column: a value shared by all runs says nothing about the pairs.
    return Table(asked, measured, rows, like=dict.fromkeys(measured[3:], value), chosen=[*asked, *measured])
