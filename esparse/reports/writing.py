"""A table written out: for the terminal at the end of a sweep, as Markdown, as CSV, and the table of latencies.

What all runs share moves into one line above the table, so that the table shows what differs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.reports.reading import Record
from esparse.reports.table import Table, cells
from esparse.reports.tabulate import table_of

if TYPE_CHECKING:
    from rich.table import Table as Rich

# How a run that has no record stands, and in which colour that is said.
MISSING = {"failed": "red", "not finished": "yellow"}


GAP = 2  # between two columns on the terminal; rich wants room for one half of it behind the last one, too
# What a narrow terminal does without, the first one first; endings of columns that have the corpus's name in front.
SPARED = ("host MiB", "device MiB", "kept", "seconds", "density", "error", " ratio", " ppl dense", " dense")


def runs_table(
    records: Sequence[Record], missing: Sequence[tuple[str, str, str]] = (), *, width: int | None = None
) -> Rich:
    """The table for the terminal; below it the runs that it lacks, as (one of MISSING, name, why).

    A table that would be wider than `width` leaves out columns of SPARED, and says which.
    """
    from rich import box
    from rich.table import Table as Rich
    from rich.text import Text

    table = Rich(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.title_justify, table.title_style, table.caption_justify = "left", "", "left"
    if not records:
        table.add_column("run without a record", overflow="fold")
        table.add_column("why", overflow="fold")
        for what, name, why in missing:
            table.add_row(Text(name), Text(f"{what}: {why}", style=MISSING[what]))
        return table
    line, columns, right, rows = cells(table_of(records))
    table.title = Text(line) if line else None
    widths = [_longest_word([column, *(row[i] for row in rows)]) for i, column in enumerate(columns)]
    spared = _spared(columns, widths, width)
    shown = [i for i, column in enumerate(columns) if column not in spared]
    for i in shown:
        justify: Any = "right" if right[i] else "left"
        table.add_column(Text(columns[i]), justify=justify, overflow="fold", min_width=widths[i])
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    lines = [Text(f"{what}: {name}: {why}", style=MISSING[what]) for what, name, why in missing]
    if spared:
        lines.append(Text(f"not shown on {width} columns: {', '.join(spared)} (python -m esparse.tables shows all)"))
    if lines:
        table.caption = Text("\n").join(lines)
    return table


def _longest_word(texts: Sequence[str]) -> int:
    return max(len(word) for text in texts for word in (text.split() or [""]))


def _spared(columns: Sequence[str], widths: Sequence[int], most: int | None) -> list[str]:
    """The columns that are left out so that the others fit without a broken word."""
    left = dict(zip(columns, widths, strict=True))
    for ending in SPARED:
        for column in [column for column in left if column == ending or (ending[0] == " " and column.endswith(ending))]:
            if most is None or sum(left.values()) + GAP * len(left) - 1 <= most:
                return [column for column in columns if column not in left]
            del left[column]
    return [column for column in columns if column not in left]


def markdown_of(table: Table, *, best: bool = False) -> str:
    """A table that is made already, as Markdown; with `best`, the cells that are ahead are bold."""
    line, columns, right, rows = cells(table)
    for i, column in table.best() if best else ():
        if column in columns:
            rows[i][columns.index(column)] = f"**{rows[i][columns.index(column)]}**"
    lines = _aligned(columns, right, rows)
    return "\n".join([line, "", *lines] if line else lines) + "\n"


# Columns of the table of latencies: header, the row's key, and how a number is written.
LATENCY = (
    ("layer", "layer", ""),
    ("tokens", "tokens", ""),
    ("dtype", "dtype", ""),
    ("kernel", "kernel", ""),
    ("dense ms", "dense_ms", ".4g"),
    ("sparse ms", "sparse_ms", ".4g"),
    ("speed-up", "speedup", ".2f"),
    ("at most", "limit_speedup", ".2f"),
    ("share of limit", "share_of_limit", ".0%"),
)


def latencies(records: Sequence[Record]) -> str:
    """A Markdown table of everything that was timed in these runs, slower cases and failures included."""
    rows, right = [], [False, False, True, False, False, *(True,) * 5]
    for record in records:
        for row in record.get("latency", []):
            row = row | ({"layer": f"{row['phase']}, {row['sequences']} sequences"} if "phase" in row else {})
            cells = ["" if row.get(key) is None else format(row[key], how) for _, key, how in LATENCY]
            if row.get("why_not"):
                cells[5] = row["why_not"]
            rows.append([f"{record['id']} {record.get('name', '')}".rstrip(), *cells])
    if not rows:
        raise Mistake("none of these runs has timed anything: they ran without bench=gemm or bench=model")
    return "\n".join(_aligned(["run", *(header for header, _, _ in LATENCY)], right, rows)) + "\n"


def _aligned(columns: list[str], right: list[bool], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose columns are aligned in plain text too."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [columns, *rows]]
    widths = [max(3, *(len(row[i]) for row in escaped)) for i in range(len(columns))]
    ruler = [
        "-" * (width - 1) + ":" if is_right else "-" * width for width, is_right in zip(widths, right, strict=True)
    ]
    lines = []
    for row in [escaped[0], ruler, *escaped[1:]]:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def csv_of(table: Table, *, spread: set[str]) -> str:
    """A table that is made already, as CSV; the columns of `spread` hold means over seeds."""
    from csv import writer

    buffer = io.StringIO()
    lines = writer(buffer, lineterminator="\n")
    columns = table.chosen or table.columns
    lines.writerow([name for c in columns for name in ([c, f"{c} std"] if c in spread else [c])])
    for row in table.rows:
        lines.writerow([value for c in columns for value in _plain(row.get(c), c in spread)])
    return buffer.getvalue()


def _plain(value: Any, spread: bool) -> list[Any]:
    if spread:
        return [value.mean, value.deviation] if value else [None, None]
    return [value if isinstance(value, str | int | float | None) else json.dumps(value)]
