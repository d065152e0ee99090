"""Charts of what a shuffle balances: channels at their places, and how far groups differ along depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esparse.reports.figures import channels as made
from esparse.reports.figures.channels import KINDS, OWN, Input, far_apart
from esparse.reports.page import marks
from esparse.reports.page.charts import Chart, Group
from esparse.reports.page.run_facts import shortened
from esparse.reports.reading import Record


def channels(records: Sequence[Record], corpus: str | None = None) -> Group:
    """A chart per kind of value and order: of the own one, and of each shuffle in runs that differ by nothing else."""
    runs = made.side_by_side(records)
    if not runs:
        return Group([])
    first = next(iter(runs.values()))
    name = made.chosen(made.input_names(first), None)
    own = runs.get("none", first)
    shown = [(OWN, own["id"], made.read_input(own, name), False)]
    others = [(label, run) for label, run in runs.items() if label != "none"][: made.MOST]
    shown += [(label, run["id"], made.read_input(run, name), True) for label, run in others]
    charts = []
    for kind, what in KINDS.items():
        own_I = shown[0][2].values[kind]
        every = [value for _, _, of_input, _ in shown for value in of_input.values[kind].tolist()]
        far = far_apart([of_input.values[kind] for _, _, of_input, _ in shown]) and min(every) > 0
        spec = marks.channels(what, min(every), max(every), far=far, many=len(own_I))
        for label, run, of_input, shuffled in shown:
            deviation = of_input.deviation(kind, shuffled=shuffled)
            note = "" if deviation is None else f": groups ± {deviation:.1%}"
            charts.append(Chart(f"{label}, {what}{note}", _places(of_input, kind, run, shuffled), spec))
    return Group(charts, least=15, columns=len(shown))


def _places(of_input: Input, kind: str, run: str, shuffled: bool) -> list[dict[str, Any]]:
    value_I = of_input.placed(kind, shuffled=shuffled)
    own = of_input.order_I is None or not shuffled
    rows = [
        {"run": run, "label": "channel", "style": [6, 0], "place": i, "value": shortened(float(value))}
        | {"channel": i if own or of_input.order_I is None else int(of_input.order_I[i])}
        for i, value in enumerate(value_I)
    ]
    mean_G = of_input.groups(kind, shuffled=shuffled)
    if mean_G is None or of_input.m is None:
        return rows
    group = {"run": run, "label": f"mean of a group of {of_input.m}", "style": [1, -1]}
    begins = [i * of_input.m for i in range(len(mean_G))]
    return rows + [
        group | {"place": begin, "begin": begin - 0.5, "end": begin + of_input.m - 0.5, "mean": shortened(float(mean))}
        for begin, mean in zip(begins, mean_G, strict=True)
    ]


def evenness(records: Sequence[Record], corpus: str | None = None) -> Group:
    """A line per shuffle over the blocks, a chart per kind of value."""
    runs = made.side_by_side(records)
    inputs = {label: [made.read_input(run, name) for name in made.input_names(run)] for label, run in runs.items()}
    if not inputs:
        return Group([])
    own = "none" if "none" in inputs else next(iter(inputs))
    lines = [(OWN, own, False), *((label, label, True) for label in inputs if label != "none")]
    charts = []
    for kind, what in KINDS.items():
        rows: list[dict[str, Any]] = []
        for i, (name, label, shuffled) in enumerate(lines):
            of_block: dict[int, list[float]] = {}
            for of_input in inputs[label]:
                if (value := of_input.deviation(kind, shuffled=shuffled)) is not None:
                    of_block.setdefault(made.block_of(of_input.name), []).append(100 * value)
            one = {"run": runs[label]["id"], "method": name, "label": name, "style": [i - 1, i]}
            rows += [one | {"block": b, "value": shortened(sum(v) / len(v))} for b, v in sorted(of_block.items())]
        spec = marks.along_depth("between groups (% of the mean)", shared=False)
        charts.append(Chart(what.partition(" (")[0], rows, spec))
    return Group(charts)
