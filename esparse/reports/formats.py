"""Many run records as one table: `python -m esparse.tables OUTPUT_ROOT`, and the end of a sweep.

What all runs share moves into one line above the table, so that the table shows what differs.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.reports.figures.catalogue import FORMATS, PICTURES, plot
from esparse.reports.grid import Grid, Record, Spread, cells, grid, means, natural, profiles, read_records
from esparse.reports.html_page import page
from esparse.reports.latex import latex_of
from esparse.reports.pairs import pairs
from esparse.reports.pivot import pivot

if TYPE_CHECKING:
    from rich.table import Table


# How a run that has no record stands, and in which colour that is said.
MISSING = {"failed": "red", "not finished": "yellow"}


def runs_table(records: Sequence[Record], missing: Sequence[tuple[str, str, str]] = ()) -> Table:
    """The table for the terminal; below it the runs that it lacks, as (one of MISSING, name, why)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.title_justify, table.title_style, table.caption_justify = "left", "", "left"
    if not records:
        table.add_column("run without a record", overflow="fold")
        table.add_column("why", overflow="fold")
        for what, name, why in missing:
            table.add_row(Text(name), Text(f"{what}: {why}", style=MISSING[what]))
        return table
    line, columns, right, rows = cells(grid(records))
    table.title = Text(line) if line else None
    for i, column in enumerate(columns):
        whole = max(len(row[i]) for row in rows) if right[i] or column == "id" else None  # never break a number
        justify: Any = "right" if right[i] else "left"
        table.add_column(Text(column), justify=justify, overflow="fold", min_width=whole)
    for row in rows:
        table.add_row(*map(Text, row))
    if missing:
        lines = [Text(f"{what}: {name}: {why}", style=MISSING[what]) for what, name, why in missing]
        table.caption = Text("\n").join(lines)
    return table


def markdown(records: Sequence[Record], *, mean: bool = False, best: bool = False, **asked: Any) -> str:
    """A Markdown table whose columns are aligned in plain text too; `asked` as in `grid`."""
    return markdown_of(_table(records, mean, asked), best=best)


def markdown_of(table: Grid, *, best: bool = False) -> str:
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
        raise ValueError("none of these runs has timed anything: they ran without bench=gemm or bench=model")
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


def csv(records: Sequence[Record], *, mean: bool = False, **asked: Any) -> str:
    """Every column with its full precision; a mean over seeds as two columns, `x` and `x std`."""
    table = _table(records, mean, asked)
    return csv_of(table, spread={c for c in table.measured if any(isinstance(r.get(c), Spread) for r in table.rows)})


def csv_of(table: Grid, *, spread: set[str]) -> str:
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


def latex(records: Sequence[Record], *, mean: bool = False, best: bool = False, **asked: Any) -> str:
    """A LaTeX tabular with the rules of booktabs; what all runs share is a comment above it."""
    return latex_of(_table(records, mean, asked), best=best)


def html(records: Sequence[Record], *, mean: bool = False, best: bool = False, **asked: Any) -> str:
    """A page for a browser, in one file: the table, which sorts by any column, and all pictures."""
    title, corpus = asked.pop("title"), asked.get("corpus")
    return page(_table(records, mean, asked), records, title=title, corpus=corpus, best=best)


def _table(records: Sequence[Record], mean: bool, asked: dict[str, Any]) -> Grid:
    if asked.pop("profile", False):
        return profiles(records)
    across, value, columns, compared = (asked.pop(name, None) for name in ("across", "value", "columns", "pairs"))
    if value and not across and not compared:
        raise ValueError("a value is chosen for a turned table or for pairs: say by which columns, --across or --pairs")
    if compared:
        table = pairs(grid(records, **asked), compared, across=across or (), value=value)
    else:
        table = pivot(means(grid(records, **asked)), across, value) if across else _flat(records, mean, asked)
    return table.choose(columns) if columns else table


def _flat(records: Sequence[Record], mean: bool, asked: dict[str, Any]) -> Grid:
    sort = asked.pop("sort", None) if mean else None
    table = grid(records, **asked)
    if not mean:
        return table
    table = means(table)
    if sort is not None:
        if sort not in table.columns:
            raise ValueError(f"no column {sort!r} to sort by; there is {', '.join(table.columns)}")
        table.rows.sort(key=lambda r: natural(r[sort].mean if isinstance(r[sort], Spread) else r[sort]))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a folder of records and writes one table; exit code 1 = no records, 2 = a mistake."""
    parser = argparse.ArgumentParser(prog="python -m esparse.tables", description="One table of many runs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that holds records (result.json) at any depth")
    kinds = ("markdown", "csv", "latex", "html", "png")
    parser.add_argument("--format", choices=kinds, help="default: by the ending of --out, else markdown")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write here instead of the terminal (a plot: always)")
    parser.add_argument("--corpus", metavar="NAME", help="perplexities of this corpus only")
    parser.add_argument("--sort", metavar="COLUMN", help="order by this column of the table, smallest first")
    parser.add_argument("--latency", action="store_true", help="what was timed (bench=gemm, bench=model), as Markdown")
    parser.add_argument("--mean", action="store_true", help="mean ± standard deviation over seeds, a row per method")
    parser.add_argument("--across", metavar="COLUMN,...", help="a column per value of these, means (--pairs: rows)")
    parser.add_argument("--pairs", metavar="COLUMN", help="compare runs that differ in this column alone, pair by pair")
    parser.add_argument("--value", metavar="COLUMN", help="with --across, --pairs: what is shown (pruned perplexity)")
    parser.add_argument("--columns", metavar="COLUMN,...", help="only these columns, in this order")
    parser.add_argument("--best", action="store_true", help="bold: the best of each model, pattern and measurement")
    parser.add_argument("--profile", action="store_true", help="the zeros of layers and heads (runs with profile=true)")
    parser.add_argument("--plot", choices=PICTURES, default="perplexity", help="which picture a .png, .svg or .pdf is")
    parser.add_argument("--layer", metavar="NAME", help="of --plot channels: a part of the name of the layer to show")
    options = parser.parse_args(argv)
    kind = options.format or _kind(options.out)
    if options.latency and kind != "markdown":
        return _stop(f"the table of latencies is written as Markdown, not {kind}", 2)
    if options.best and kind not in ("markdown", "latex", "html"):
        return _stop(f"--best sets cells in bold, which {kind} does not have", 2)
    if options.best and options.pairs:
        return _stop("--best marks the best of a measurement, and --pairs shows differences: leave one of them out", 2)
    if not options.folder.is_dir():
        return _stop(f"{options.folder} is not a folder", 2)
    if kind == "png" and options.out is None:
        return _stop("a plot needs a file: --out plot.png", 2)
    records = read_records(options.folder)
    if not records:
        return _stop(f"no run has finished in {options.folder} (looked for result.json)", 1)
    try:
        if kind == "png":
            plot(records, options.out, name=options.plot, corpus=options.corpus, layer=options.layer)
        else:
            write = {"markdown": markdown, "csv": csv, "latex": latex, "html": html}[kind]
            asked = {"corpus": options.corpus, "sort": options.sort, "value": options.value, "pairs": options.pairs}
            asked["profile"] = options.profile
            for name in ("across", "columns"):
                given = getattr(options, name)
                asked[name] = given.split(",") if given else None
            if kind == "html":
                asked["title"] = f"Runs in {options.folder.resolve().name}"
            if options.best:
                asked["best"] = True
            asked_mean = options.mean or (bool(options.across) and not options.pairs)
            written = latencies(records) if options.latency else write(records, mean=asked_mean, **asked)
            if options.out is None:
                print(written, end="")
            else:
                options.out.write_text(written, encoding="utf-8")
    except ValueError as error:
        return _stop(str(error), 2)
    except OSError as error:
        return _stop(f"cannot write {options.out}: {error.strerror or error}", 1)
    return 0


def _kind(out: Path | None) -> str:
    endings = {".csv": "csv", ".tex": "latex", ".html": "html", ".htm": "html", **dict.fromkeys(FORMATS, "png")}
    return endings.get(out.suffix.lower(), "markdown") if out is not None else "markdown"


def _stop(sentence: str, code: int) -> int:
    print(f"esparse: {sentence}", file=sys.stderr)
    return code
