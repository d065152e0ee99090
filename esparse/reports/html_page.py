"""One HTML page of many runs: a table that sorts by any column and the pictures, in a file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from esparse.reports.figures.catalogue import PICTURES, draw, svg
from esparse.reports.reading import NUMBER, Record
from esparse.reports.table import Spread, Table

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #f3f4f6; --line: #d0d7de; --mark: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #14171a; --soft: #20252a; --line: #3a424a; --mark: #79b8ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.25rem; }
p { max-width: 70ch; margin: 0.25rem 0 0.75rem; }
.wide { overflow: auto; max-height: 85vh; border: 1px solid var(--line); border-radius: 6px; }
.find { display: flex; gap: 0.75rem; align-items: baseline; flex-wrap: wrap; margin-bottom: 0.5rem; }
.find input { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.2rem 0.5rem; width: 18rem; max-width: 100%; }
.wide:focus-visible, .find input:focus-visible, th button:focus-visible { outline: 2px solid var(--mark);
  outline-offset: 1px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.875rem; min-width: 100%; }
th, td { padding: 0.3rem 0.6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; } tbody tr:hover { background: var(--soft); }
.number { text-align: right; }
th { background: var(--soft); padding: 0; position: sticky; top: 0; }
th button { all: unset; cursor: pointer; padding: 0.4rem 0.6rem; width: 100%; box-sizing: border-box; }
th button { font-weight: 600; }
th button::after { content: "\\2195"; opacity: 0.35; padding-left: 0.35em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; color: var(--mark); }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; color: var(--mark); }
figure { margin: 0.5rem 0; padding: 0.5rem; background: #fff; color: #111; border: 1px solid var(--line);
  border-radius: 6px; overflow-x: auto; width: fit-content; max-width: 100%; }
figure svg { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) { body { padding: 0.6rem; } h1 { font-size: 1.25rem; } }
"""

# Numbers by size, text by its words and numbers; what is not there stays at the end, whichever way.
SCRIPT = """
const table = document.querySelector("table");
const value = (row, i) => row.cells[i].dataset.value;
function sortBy(head) {
  const i = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const compare = head.classList.contains("number")
    ? (a, b) => Number(a) - Number(b)
    : (a, b) => a.localeCompare(b, "en", { numeric: true });
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = value(a, i), y = value(b, i);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return down ? compare(y, x) : compare(x, y);
  });
  table.tBodies[0].append(...rows);
}
table.tHead.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) sortBy(button.closest("th"));
});
const find = document.querySelector("input[type=search]"), count = document.querySelector("output");
find.addEventListener("input", () => {
  const words = find.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let left = 0;
  for (const row of table.tBodies[0].rows) {
    const cells = [...row.cells].map((cell) => cell.textContent.toLowerCase());
    row.hidden = !words.every((word) => cells.some((text) => text.includes(word)));
    left += !row.hidden;
  }
  count.value = words.length ? `${left} of ${table.tBodies[0].rows.length} rows` : "";
});
"""


def page(table: Table, records: Sequence[Record], *, title: str, corpus: str | None = None, best: bool = False) -> str:
    """The page of these runs: `table` as it was asked for, and every picture that the records have data for.

    With `best`, the cells that are ahead are bold.
    """
    shared, columns = table.shown()
    said = ", ".join(f"{escape(c)} <b>{escape(table.text(c, table.rows[0].get(c)))}</b>" for c in shared)
    drawn = {name: figure for name in PICTURES if (figure := draw(name, records, corpus=corpus)) is not None}
    missing = [f"{PICTURES[name].title} ({PICTURES[name].needs})" for name in PICTURES if name not in drawn]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(records)} run{'s' if len(records) > 1 else ''} of esparse.{f' All have {said}.' if said else ''}</p>",
        '<h2 id="runs">Runs</h2><p>Click a column to sort by it, once more to turn it round.</p>',
        '<p class="find"><label>Show rows with <input type="search" placeholder="entropy 2:4"></label>',
        "<output></output></p>",
        '<div class="wide" role="region" aria-labelledby="runs" tabindex="0">',
        _table(table, columns, table.best() if best else set()),
        "</div>",
        *(_figure(name, svg(name, figure)) for name, figure in drawn.items()),
        f"<p><small>Not drawn, as they need runs: {escape('; '.join(missing))}.</small></p>" if missing else "",
        f"</main><script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(table: Table, columns: Sequence[str], ahead: set[tuple[int, str]]) -> str:
    numbers = {c for c in columns if all(isinstance(r.get(c), (*NUMBER, Spread, type(None))) for r in table.rows)}
    heads = "".join(
        f'<th scope="col"{_class(c in numbers)}><button type="button">{escape(c)}</button></th>' for c in columns
    )
    rows = "\n".join(
        "<tr>" + "".join(_cell(table, c, row.get(c), c in numbers, (i, c) in ahead) for c in columns) + "</tr>"
        for i, row in enumerate(table.rows)
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _cell(table: Table, column: str, value: Any, number: bool, ahead: bool) -> str:
    shown = table.text(column, value)
    plain: Any = value.mean if isinstance(value, Spread) else value
    if isinstance(plain, float) and math.isinf(plain):
        plain = "Infinity" if plain > 0 else "-Infinity"  # as JavaScript reads it
    nothing = value is None or (isinstance(plain, float) and math.isnan(plain))
    key = "" if nothing else f' data-value="{escape(str(plain if number else shown))}"'
    inside = f"<b>{escape(shown)}</b>" if ahead else escape(shown)
    return f"<td{_class(number)}{key}>{inside}</td>"


def _class(number: bool) -> str:
    return ' class="number"' if number else ""


def _figure(name: str, element: str) -> str:
    picture = PICTURES[name]
    return (
        f"<section><h2>{escape(picture.title)}</h2><p>{escape(picture.caption)}</p><figure>{element}</figure></section>"
    )
