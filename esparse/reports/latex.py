"""A table as LaTeX for a paper: the rules of booktabs, names escaped, numbers below each other."""

from __future__ import annotations

from collections.abc import Sequence

from esparse.reports.table import Table, cells, text

SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
SPECIAL |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$"}


def latex_of(table: Table, *, best: bool = False) -> str:
    """A tabular; what all runs share is a comment above it. With `best`, the cells that are ahead are bold.

    The columns of a table that is turned by several columns stand below the values of the first one.
    """
    line, columns, right, rows = cells(table)
    ahead = table.best() if best else set()
    body: list[list[str]] = [[] for _ in rows]
    for k, column in enumerate(columns):
        widest = max((row[k].partition(" ± ")[2] for row in rows), key=len)
        for i, row in enumerate(rows):
            cell, room = _in_latex(row[k], widest)
            body[i].append((f"\\textbf{{{cell}}}" if (i, column) in ahead else cell) + room)
    lines = [r"% needs \usepackage{booktabs}", *([f"% {line}"] if line else [])]
    lines += [f"\\begin{{tabular}}{{{''.join('r' if r else 'l' for r in right)}}}", r"\toprule"]
    lines += [*_heads(table, columns), r"\midrule", *(_row(of_row) for of_row in body)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _heads(table: Table, columns: list[str]) -> list[str]:
    """The header, in two lines if columns stand for more than one value each."""
    first = next((next(iter(values)) for values in table.stands.values() if len(values) > 1), None)
    if first is None:
        return [_row([_escaped(column) for column in columns])]
    spans: list[tuple[str, int, int]] = []  # text, the first column, the last one
    for place, column in enumerate(columns, start=1):
        above = text(first, table.stands[column][first]) or "-" if column in table.stands else ""
        begin = spans.pop()[1] if spans and spans[-1][0] == above else place
        spans.append((above, begin, place))
    upper = [
        f"\\multicolumn{{{end - begin + 1}}}{{c}}{{{_escaped(above)}}}" if above else " & " * (end - begin)
        for above, begin, end in spans
    ]
    rules = [f"\\cmidrule(lr){{{begin}-{end}}}" for above, begin, end in spans if above]
    lower = [_below(table.stands[column]) if column in table.stands else column for column in columns]
    return [_row(upper), " ".join(rules), _row([_escaped(column) for column in lower])]


def _below(values: dict[str, object]) -> str:
    return ", ".join(text(column, value) or "-" for column, value in list(values.items())[1:])


def _row(texts: Sequence[str]) -> str:
    line = " & ".join(texts) + r" \\"
    return f"{{}}{line}" if line[0] in "[*" else line  # else [ and * would be arguments of the previous \\


def _in_latex(cell: str, widest: str) -> tuple[str, str]:
    """The cell, and room for the widest deviation of its column, so that the numbers stand below each other."""
    mean, _, own = cell.partition(" ± ")
    if not own:
        return _escaped(cell), rf"\phantom{{ $\pm$ {widest}}}" if widest and cell else ""
    digits = "0" * (len(widest) - len(own))
    return _escaped(mean) + r" $\pm$ " + (rf"\phantom{{{digits}}}" if digits else "") + own, ""


def _escaped(cell: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in cell)
