"""One HTML page of many runs: a table that sorts, what stands behind each row, and figures that follow both."""

from __future__ import annotations

import gzip
import json
import math
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from esparse.reports.figures.catalogue import PICTURES
from esparse.reports.page import vega
from esparse.reports.page.charts import Group
from esparse.reports.page.pictures import as_data, caption, drawn
from esparse.reports.page.run_facts import run_facts
from esparse.reports.reading import NUMBER, Record
from esparse.reports.table import Spread, Table, ids_of
from esparse.reports.tabulate import scored_by

HERE = Path(__file__).parent
# What columns mean: the end of their names, and what stands on the page.
MEANINGS = {
    "density": "Share of the weights of the pruned layers that survive, as counted on them.",
    " ppl dense": "Perplexity of the model before pruning, measured in the same run.",
    " ppl pruned": "Perplexity of the pruned model on that text: the exponential of the mean negative log-likelihood "
    "of a token. Lower is better.",
    " ratio": "Pruned over dense perplexity: 1 is as good as the dense model.",
    "error": "Mean over the layers of ‖X(W − W′)ᵀ‖ / ‖XWᵀ‖: how far the outputs of a pruned layer (weights W′) are "
    "from those of the dense one (W) for the same inputs X, on calibration tokens. 0: no difference; 1: as large as "
    "the output itself. Lower is better, and it can be compared between metrics.",
    "kept": "Mean over the layers of the share of the total score that the surviving weights have. Each metric has a "
    "score of its own, so that it can be compared between patterns, shuffles and seeds of one metric, never between "
    "metrics; sorting keeps metrics apart.",
    "seconds": "Wall-clock time of the run, with evaluation.",
    "host MiB": "The most main memory that the run took.",
    "device MiB": "The most memory of a GPU that the run took.",
}
# What a narrow window leaves out at first; the rows that fold out have it.
MINOR = ("id", "seed", "density", "error", "kept", "seconds", "host MiB", "device MiB", "runs")


def page(
    table: Table,
    records: Sequence[Record],
    *,
    title: str,
    corpus: str | None = None,
    best: bool = False,
    start: Path | None = None,
) -> str:
    """The page of these runs: `table` as it was asked for, and every picture that the records have data for.

    With `best`, the cells that are ahead are bold. `start`: the folder in which the page will lie, the current one by
    default. Without Vega's package there are no figures, which the page says.
    """
    shared, columns = table.shown()
    in_common = ", ".join(f"{escape(c)} <b>{escape(table.text(c, table.rows[0].get(c)))}</b>" for c in shared)
    library = vega.library()
    groups = drawn(records, corpus) if library is not None else {}
    absent = [f"{PICTURES[name].title} ({PICTURES[name].needs})" for name in PICTURES if name not in groups]
    facts = run_facts(records, start=start or Path.cwd(), corpus=corpus)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_own('style.css')}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(records)} run{'s' if len(records) > 1 else ''} of esparse."
        f"{f' All have {in_common}.' if in_common else ''}</p>",
        f'<p class="dim">{escape(_when(records))}</p>',
        _runs(table, columns, best),
        _meanings(columns),
        *(_section(name, group) for name, group in groups.items()),
        f"<p><small>{escape(_not_drawn(library, absent))}</small></p>",
        "</main>",
        _packed("facts", json.dumps(facts)),
        *([_packed("pictures", json.dumps(as_data(groups))), _packed("library", library)] if library else []),
        f"<script>{_own('page.js')}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _own(file: str) -> str:
    return (HERE / file).read_text(encoding="utf-8")


def _packed(name: str, content: str) -> str:
    """Text for page.js, compressed: as text, some hundred runs would make a page of many megabytes."""
    data = b64encode(gzip.compress(content.encode(), mtime=0)).decode()
    return f'<script type="text/plain" id="{name}">{data}</script>'


def _when(records: Sequence[Record]) -> str:
    """When the runs began and by which versions and commits, as far as they say so."""
    days = sorted({str(record["started"])[:10] for record in records if record.get("started")})
    parts = [f"Run {' to '.join(dict.fromkeys((days[0], days[-1])))}"] if days else []
    for name in ("esparse", "commit", "torch", "device"):
        of_all = [str((record.get("environment") or {}).get(name) or "") for record in records]
        values = list(dict.fromkeys(filter(None, of_all)))
        if values:
            parts.append(f"{name} {', '.join(values[:3])}{f' and {len(values) - 3} more' if len(values) > 3 else ''}")
    return f"{'; '.join(parts)}." if parts else ""


def _not_drawn(library: str | None, absent: Sequence[str]) -> str:
    if library is None:
        return f"Without figures: {vega.missing()}."
    return f"Not drawn, as they need runs: {'; '.join(absent)}." if absent else ""


def _runs(table: Table, columns: Sequence[str], best: bool) -> str:
    return f"""<h2 id="runs">Runs</h2>
<p>Click a column to sort by it, once more to turn it round. ▸ folds out a run: its files, settings and layers. Tick
two or more to see what differs between them.</p>
<p class="find"><label>Show runs with <input type="search" placeholder="entropy 2:4"></label>
<output id="count"></output><label class="every"><input type="checkbox"> all columns</label></p>
<div id="differences" aria-live="polite"></div>
<div class="wide" id="table" role="region" aria-labelledby="runs" tabindex="0">
{_table(table, columns, table.best() if best else set())}
</div>
<p id="hint" class="dim" aria-live="polite"></p>"""


def _meanings(columns: Sequence[str]) -> str:
    """What the columns that are there mean, once for all corpora."""
    columns_of = {end: [c for c in columns if c == end or (end[0] == " " and c.endswith(end))] for end in MEANINGS}
    items = "".join(
        f"<dt>{escape(found[0] if len(found) == 1 else '…' + end)}</dt><dd>{escape(MEANINGS[end])}</dd>"
        for end, found in columns_of.items()
        if found
    )
    return (
        f'<details class="meaning"><summary>What the columns mean</summary><dl>{items}</dl></details>' if items else ""
    )


def meaning(column: str) -> str:
    """What a column says, for a pointer that rests on it; nothing for a choice or setting."""
    return next(
        (text for end, text in MEANINGS.items() if column == end or (end[0] == " " and column.endswith(end))), ""
    )


def _section(name: str, group: Group) -> str:
    picture = PICTURES[name]
    how = " rows" if group.columns else " few" if group.least > 21 else ""
    return f"""<section id="picture-{name}"><h2>{escape(picture.title)}</h2>
<p>{escape(caption(name))} <span class="said"></span></p><ul class="legend"></ul>
<div class="charts{how}" style="--least: {group.least}rem; --columns: {group.columns}"></div></section>"""


def _table(table: Table, columns: Sequence[str], ahead: set[tuple[int, str]]) -> str:
    numbers = {c for c in columns if all(isinstance(r.get(c), (*NUMBER, Spread, type(None))) for r in table.rows)}
    minor = {c for c in columns if c in table.asked or c in MINOR or c.endswith(" ppl dense")}
    heads = "".join(_head(table, c, c in numbers, c in minor) for c in columns)
    first = '<th class="handle"></th><th scope="col" class="narrow"><button type="button">run</button></th>'
    rows = "\n".join(
        _row(table, row, columns)
        + "".join(_cell(table, c, row.get(c), [c in numbers, c in minor, (i, c) in ahead]) for c in columns)
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    return f"<table><thead><tr>{first}{heads}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _head(table: Table, column: str, number: bool, minor: bool) -> str:
    means = meaning(table.like.get(column, column))
    title = f' title="{escape(means)}"' if means else ""
    within = " data-within" if table.like.get(column, column) == "kept" else ""
    return f'<th scope="col"{_class(number, minor)}{within}{title}><button type="button">{escape(column)}</button></th>'


def _row(table: Table, row: dict[str, Any], columns: Sequence[str]) -> str:
    """The beginning of a row: which runs it stands for, how to fold them out and compare them, and all in one cell."""
    ids, name = ids_of([row]), escape(_name(table, row, columns))
    whole = f'<td class="narrow" data-value="{name}">{name}</td>'
    if not ids:
        return f'<tr class="run"><td class="handle"></td>{whole}'
    label = escape(f"{ids[0]} and {len(ids) - 1} more" if len(ids) > 1 else ids[0])
    fold = (
        f'<button type="button" class="fold" disabled aria-expanded="false" aria-label="details of {label}"></button>'
    )
    tick = f'<input type="checkbox" class="compare" disabled aria-label="compare {label}">'
    of = f'data-runs="{escape(" ".join(ids))}" data-scored="{escape(scored_by(row, table))}"'
    return f'<tr class="run" {of}><td class="handle">{fold}{tick}</td>{whole}'


def _name(table: Table, row: dict[str, Any], columns: Sequence[str]) -> str:
    """What was asked, as far as columns say it, for the one cell that a narrow window has room for."""
    parts = []
    for column in (c for c in columns if c in table.asked and c not in ("id", "runs")):
        shown = table.text(column, row.get(column))
        if shown and shown != "none":
            parts.append(f"{column.rpartition('.')[2]} {shown}" if "." in column or column == "seed" else shown)
    return " ".join(parts) or str(row.get("id") or "none")


def _cell(table: Table, column: str, value: Any, is_: Sequence[bool]) -> str:
    number, minor, ahead = is_
    shown = table.text(column, value)
    plain: Any = value.mean if isinstance(value, Spread) else value
    if isinstance(plain, float) and math.isinf(plain):
        plain = "Infinity" if plain > 0 else "-Infinity"  # as JavaScript reads it
    nothing = value is None or (isinstance(plain, float) and math.isnan(plain))
    key = "" if nothing else f' data-value="{escape(str(plain if number else shown))}"'
    inside = f"<b>{escape(shown)}</b>" if ahead else escape(shown)
    return f"<td{_class(number, minor)}{key}>{inside}</td>"


def _class(number: bool, minor: bool) -> str:
    names = " ".join(["number"] * number + ["minor"] * minor)
    return f' class="{names}"' if names else ""
