"""`python -m esparse.tables OUTPUT_ROOT`: the command line, and one table in each of its formats."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esparse.errors import Mistake
from esparse.reports.figures.catalogue import FORMATS, PICTURES, plot
from esparse.reports.latex import latex_of
from esparse.reports.page import vega
from esparse.reports.page.html_page import page
from esparse.reports.pairs import pairs
from esparse.reports.pivot import pivot
from esparse.reports.reading import Record, read_records, stop
from esparse.reports.table import Spread, Table, natural
from esparse.reports.tabulate import check_corpus, means, profiles, table_of
from esparse.reports.writing import csv_of, latencies, markdown_of

# Options that what is written has no use for: of a picture, of the table of latencies, of profiles and of pairs.
OF_TABLES = ("mean", "across", "pairs", "value", "columns", "sort", "best")
UNUSED = {
    "picture": ("latency", "profile", *OF_TABLES),
    "latency": ("profile", "corpus", *OF_TABLES),
    "profile": ("corpus", *(option for option in OF_TABLES if option != "best")),
    "pairs": ("mean", "sort"),
}

ENDINGS = {".csv": "csv", ".tex": "latex", ".html": "html", ".htm": "html"}  # of tables that are no Markdown


def markdown(records: Sequence[Record], *, mean: bool = False, best: bool = False, **asked: Any) -> str:
    """A Markdown table whose columns are aligned in plain text too; `asked` as in `table_of`."""
    return markdown_of(_table(records, mean, asked), best=best)


def csv(records: Sequence[Record], *, mean: bool = False, **asked: Any) -> str:
    """Every column with its full precision; a mean over seeds as two columns, `x` and `x std`."""
    table = _table(records, mean, asked)
    return csv_of(table, spread={c for c in table.measured if any(isinstance(r.get(c), Spread) for r in table.rows)})


def latex(records: Sequence[Record], *, mean: bool = False, best: bool = False, **asked: Any) -> str:
    """A LaTeX tabular with the rules of booktabs; what all runs share is a comment above it."""
    return latex_of(_table(records, mean, asked), best=best)


def html(records: Sequence[Record], *, mean: bool = False, best: bool = False, **asked: Any) -> str:
    """A page for a browser, in one file: the table, which sorts by any column, and all pictures.

    Links to records are relative to `start`, the folder in which the page will lie.
    """
    title, start, corpus = asked.pop("title"), asked.pop("start", None), asked.get("corpus")
    return page(_table(records, mean, asked), records, title=title, corpus=corpus, best=best, start=start)


def _table(records: Sequence[Record], mean: bool, asked: dict[str, Any]) -> Table:
    if asked.pop("profile", False):
        return profiles(records)
    across, value, columns, compared = (asked.pop(name, None) for name in ("across", "value", "columns", "pairs"))
    if value and not across and not compared:
        raise Mistake("a value is chosen for a turned table or for pairs: say by which columns, --across or --pairs")
    if compared:
        table = pairs(table_of(records, **asked), compared, across=across or (), value=value)
    else:
        table = pivot(means(table_of(records, **asked)), across, value) if across else _flat(records, mean, asked)
    return table.choose(columns) if columns else table


def _flat(records: Sequence[Record], mean: bool, asked: dict[str, Any]) -> Table:
    sort = asked.pop("sort", None) if mean else None
    table = table_of(records, **asked)
    if not mean:
        return table
    table = means(table)
    if sort is not None:
        if sort not in table.columns:
            raise Mistake(f"no column {sort!r} to sort by; there is {', '.join(table.columns)}")
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
    parser.add_argument("--plot", choices=PICTURES, help="which picture a .png, .svg or .pdf is (else perplexity)")
    parser.add_argument("--layer", metavar="NAME", help="of --plot channels: a part of the name of the layer to show")
    options = parser.parse_args(argv)
    kind = options.format or _kind(options.out)
    for name in ("corpus", "sort", "across", "pairs", "value", "columns", "layer"):
        if getattr(options, name) is not None and "" in map(str.strip, getattr(options, name).split(",")):
            what = {"corpus": "a corpus", "layer": "a layer"}.get(name, "a column")
            return stop(f"--{name} needs the name of {what}, got {getattr(options, name)!r}", 2)
        if name in ("across", "columns") and (twice := _twice(getattr(options, name))) is not None:
            return stop(f"--{name} names {twice} twice: once is enough", 2)
    if kind is None:
        return stop(
            f"--out {options.out}: a table ends in {', '.join(sorted(ENDINGS))} or .md, a picture in "
            f"{', '.join(sorted(FORMATS))}; --format says it where the name ends otherwise",
            2,
        )
    if options.layer and options.plot != "channels":
        return stop("--layer chooses what --plot channels shows: add that, or leave --layer out", 2)
    if options.plot and kind == "html":
        return stop("the page has all pictures: leave --plot out, or write one picture, --out plot.svg", 2)
    if options.plot and kind != "png":
        return stop(f"--plot {options.plot} is a picture and needs a file: --out {options.plot}.png (.svg, .pdf)", 2)
    if options.latency and kind != "markdown":
        return stop(f"the table of latencies is written as Markdown, not {kind}", 2)
    if options.best and kind not in ("markdown", "latex", "html"):
        return stop(f"--best sets cells in bold, which {kind} does not have", 2)
    if options.best and options.pairs:
        return stop("--best marks the best of a measurement, and --pairs shows differences: leave one of them out", 2)
    if (unused := _unused(options, kind)) is not None:
        return stop(unused, 2)
    if options.across and not options.pairs and "seed" in _names(options.across):
        return stop(
            "--across seed: the cells of a turned table are means over seeds, so a seed has no column of its own; "
            "--pairs seed compares seeds, and without --across each run has a row",
            2,
        )
    if not options.folder.is_dir():
        return stop(f"{options.folder} is not a folder", 2)
    if kind == "png" and options.out is None:
        return stop("a plot needs a file: --out plot.png", 2)
    records = read_records(options.folder)
    if not records:
        return stop(f"no run has finished in {options.folder} (looked for result.json)", 1)
    try:
        check_corpus(records, options.corpus)
        shown = len(records)
        if kind == "png":
            shown = plot(
                records, options.out, name=options.plot or "perplexity", corpus=options.corpus, layer=options.layer
            )
        else:
            write = {"markdown": markdown, "csv": csv, "latex": latex, "html": html}[kind]
            asked = {"corpus": options.corpus, "sort": options.sort, "value": options.value, "pairs": options.pairs}
            asked["profile"] = options.profile
            for name in ("across", "columns"):
                given = getattr(options, name)
                asked[name] = _names(given) if given else None
            if kind == "html" and vega.library() is None:
                print(f"esparse: the page has no figures: {vega.missing()}", file=sys.stderr)
            if kind == "html":
                asked["title"] = f"Runs in {options.folder.resolve().name}"
                asked["start"] = (options.out or Path("page")).absolute().parent
            if options.best:
                asked["best"] = True
            asked_mean = options.mean or (bool(options.across) and not options.pairs)
            for name in ("latency", "profile"):
                if getattr(options, name):
                    shown = sum(bool(record.get(name)) for record in records)
            written = latencies(records) if options.latency else write(records, mean=asked_mean, **asked)
            if options.out is None:
                print(written, end="", flush=True)
            else:
                options.out.write_text(written, encoding="utf-8")
    except ValueError as error:
        return stop(str(error), 2)
    except BrokenPipeError:  # a reader such as `head` that has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return 0
    except OSError as error:
        return stop(f"cannot write {options.out or 'the table'}: {error.strerror or error}", 1)
    if options.out is not None:
        what = {"png": "a picture", "html": "a page"}.get(kind, "a table")
        runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
        print(f"{options.out}: {what} of {runs if shown == len(records) else f'{shown} of {runs}'}")
    return 0


def _names(given: str) -> list[str]:
    return [column.strip() for column in given.split(",")]


def _twice(given: str | None) -> str | None:
    """The first column that is named again."""
    names = _names(given) if given else []
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def _unused(options: argparse.Namespace, kind: str) -> str | None:
    """The sentence for options that would change nothing."""
    what = "picture" if kind == "png" else next((one for one in UNUSED if getattr(options, one, None)), "")
    unused = [f"--{name}" for name in UNUSED.get(what, ()) if getattr(options, name)]
    if not unused:
        return None
    writes = "a picture" if what == "picture" else f"the table of --{what}"
    return f"{' and '.join(unused)} would change nothing in {writes}: leave {'it' if len(unused) == 1 else 'them'} out"


def _kind(out: Path | None) -> str | None:
    """What is written, by the ending of the file; None for an ending that stands for nothing."""
    if out is None or out.suffix.lower() in ("", ".md", ".markdown", ".txt"):
        return "markdown"
    return (ENDINGS | dict.fromkeys(FORMATS, "png")).get(out.suffix.lower())
