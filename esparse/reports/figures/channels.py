"""Entropy, norm and score of the input channels, in their own order and in a shuffle's, which balances them.

Of runs with profile=true, from channels.safetensors and orders.safetensors beside the record (records/audit.py). Runs
that differ by nothing but their shuffle stand side by side.

Shapes: I channels, G groups.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.reports.figures.curves import Points, block_of, finished, grid_of, line
from esparse.reports.figures.plots import COLORS, MARKERS
from esparse.reports.reading import Record, at
from esparse.reports.table import exact, text
from esparse.reports.tabulate import leaves, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Values = NDArray[Any]

KINDS = {"entropy": "entropy (nats)", "norm": "norm (RMS)", "score": "mean score"}
OWN = "own order"
MOST = 4  # shuffles beside the own order


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """The channels of the tensor that a layer reads: values in their own order, by kind, and the shuffle's order."""

    name: str  # of the first layer that reads it
    values: dict[str, Values]
    order_I: Values | None  # the channel at each place; None without a shuffle
    m: int | None  # channels of a group; None if the pattern has no groups

    def placed(self, kind: str, *, shuffled: bool) -> Values:
        """The values by place."""
        own_I = self.values[kind]
        return own_I if self.order_I is None or not shuffled else own_I[self.order_I]

    def groups(self, kind: str, *, shuffled: bool) -> Values | None:
        """The mean of each group of m, without a shorter last group; None if there is no whole group."""
        value_I = self.placed(kind, shuffled=shuffled)
        if self.m is None or len(value_I) < self.m:
            return None
        return value_I[: len(value_I) // self.m * self.m].reshape(-1, self.m).mean(1)

    def deviation(self, kind: str, *, shuffled: bool) -> float | None:
        """The standard deviation of the groups' means, relative to their mean; None if there is none."""
        mean_G = self.groups(kind, shuffled=shuffled)
        return None if mean_G is None or not mean_G.mean() else float(mean_G.std() / abs(mean_G.mean()))


def channels(records: Sequence[Record], layer: str | None = None) -> Figure | None:
    """Every channel of one input at its place, and the means of the groups, without a shuffle and with each.

    `layer`: a part of the name of a layer that reads the input; by default the first one of the middle block. Raises
    ValueError where no layer has such a name.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = side_by_side(records)
    if not runs:
        return None
    first = next(iter(runs.values()))
    name = chosen(input_names(first), layer)
    panels = [(OWN, read_input(runs.get("none", first), name), False)]
    panels += [(label, read_input(run, name), True) for label, run in runs.items() if label != "none"][:MOST]
    width = min(3.6, 11.4 / len(panels))
    figure = Figure(figsize=(width * len(panels), 1.9 * len(KINDS) + 0.6), layout="constrained")
    axes = figure.subplots(len(KINDS), len(panels), squeeze=False, sharex=True, sharey="row")
    for row, (kind, what) in zip(axes, KINDS.items(), strict=True):
        for ax, (label, of_input, shuffled) in zip(row, panels, strict=True):
            _places(ax, of_input, kind, shuffled=shuffled)
            if kind == next(iter(KINDS)):
                ax.set_title(label, fontsize=10, loc="left")
        row[0].set_ylabel(what, fontsize=9)
        if far_apart([of_input.values[kind] for _, of_input, _ in panels]):
            row[0].set_yscale("log")
    for ax in axes[-1]:
        ax.set_xlabel("place of the channel", fontsize=9)
    asked = [first["model"]["name"], first["sparsity"]["pattern"], str(at(first, "config.choices.metric") or "-")]
    figure.suptitle(f"{', '.join(asked)}: the input of {name}", fontsize=10)
    handles = [Line2D([], [], color=COLORS[5], marker="o", markersize=4, linestyle="none")]
    labels, m = ["channel"], panels[0][1].m
    if m is not None:
        handles.append(Line2D([], [], color=COLORS[1], linewidth=2))
        labels.append(f"mean of a group of {m}, ± standard deviation between groups")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def evenness(records: Sequence[Record]) -> Figure | None:
    """How much the groups' means differ in each block, without a shuffle and with each."""
    runs = side_by_side(records)
    inputs = {label: [read_input(run, name) for name in input_names(run)] for label, run in runs.items()}
    if not any(of_input.m is not None for of_run in inputs.values() for of_input in of_run):
        return None
    own = inputs.get("none", next(iter(inputs.values())))
    lines = [(OWN, own, False), *((label, of_run, True) for label, of_run in inputs.items() if label != "none")]
    figure, axes = grid_of(len(KINDS))
    for ax, (kind, what) in zip(axes, KINDS.items(), strict=True):
        for i, (label, of_run, shuffled) in enumerate(lines):
            points: Points = {}
            for of_input in of_run:
                if (value := of_input.deviation(kind, shuffled=shuffled)) is not None:
                    points.setdefault(block_of(of_input.name), []).append(100 * value)
            color = COLORS[(i - 1) % len(COLORS)] if shuffled else "black"
            style = "-" if shuffled else "--"
            line(ax, points, color=color, marker=MARKERS[i % len(MARKERS)], label=label, linestyle=style)
        ax.set_ylim(bottom=0)
        ax.set_title(what.partition(" (")[0], fontsize=10)
        ax.set_xlabel("block", fontsize=9)
        ax.set_ylabel("between groups (% of the mean)", fontsize=9)
    return finished(figure)


def _places(ax: Axes, of_input: Input, kind: str, *, shuffled: bool) -> None:
    # As pixels: the channels of a large model are thousands, in every panel.
    value_I = of_input.placed(kind, shuffled=shuffled)
    size = max(1.0, min(3.0, 500 / len(value_I)))
    ax.plot(range(len(value_I)), value_I, "o", color=COLORS[5], markersize=size, markeredgewidth=0, rasterized=True)
    mean_G = of_input.groups(kind, shuffled=shuffled)
    if mean_G is not None and of_input.m is not None:
        begins = [i * of_input.m - 0.5 for i in range(len(mean_G))]
        ends = [begin + of_input.m for begin in begins]
        ax.hlines(mean_G, begins, ends, color=COLORS[1], linewidth=1.6, rasterized=True)
        deviation = of_input.deviation(kind, shuffled=shuffled)
        if deviation is not None:
            ax.set_title(f"± {deviation:.1%}", fontsize=9, loc="right", color=COLORS[1])
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def far_apart(values: Sequence[Values]) -> bool:
    """Whether a few channels would press all others together."""
    import numpy

    joined = numpy.concatenate(values)
    return bool(joined.max() > 20 * numpy.median(joined) > 0)


def side_by_side(records: Sequence[Record]) -> dict[str, Record]:
    """The profiled runs that differ by nothing but their shuffle, by its name: of all such the most, or the first."""
    profiled = {r["id"]: r for r in records if "folder" in r and _is_whole(r["folder"])}
    alike: dict[str, list[Record]] = {}
    if profiled:
        for row in table_of(list(profiled.values())).rows:
            record = profiled[row["id"]]
            of_run = leaves(record["config"])
            rest = {k: v for k, v in of_run.items() if not k.startswith("shuffle.") and k != "choices.shuffle"}
            alike.setdefault(exact([record["model"]["name"], record["sparsity"]["pattern"], rest]), []).append(record)
    if not alike:
        return {}
    most = max(alike.values(), key=len)
    by_id = {record["id"]: record for record in most}
    return {label: by_id[identity] for identity, label in _labels(most)}


def _is_whole(folder: Path) -> bool:
    """Whether a run's channels are there and whole; says so if they are damaged."""
    files = [path for name in ("channels", "orders") if (path := folder / f"{name}.safetensors").is_file()]
    if not files or files[0].stem != "channels":
        return False
    faults = [_fault(path, path.stat().st_mtime_ns) for path in files]  # all of them are said
    return faults == [None] * len(files)


@cache
def _fault(path: Path, changed: int) -> str | None:
    """What is wrong with a file, said once as long as nobody has `changed` it: pictures ask several times."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            entries = set(file.keys())
        inputs = {entry.partition("/")[2] for entry in entries} if path.stem == "channels" else set()
        missing = sorted({f"{kind}/{name}" for kind in KINDS for name in inputs} - entries)
        fault = f"it has no {missing[0]}" if missing else None
    except (SafetensorError, OSError) as error:
        fault = f"it is damaged ({error})"
    if fault is not None:
        print(f"esparse: {path} is left out: {fault}", file=sys.stderr)
    return fault


def alike(records: Sequence[Record]) -> list[Record]:
    """The runs that stand side by side."""
    return list(side_by_side(records).values())


def shown(records: Sequence[Record]) -> list[Record]:
    """Those of them that have room beside each other; of several, the one without a shuffle is the own order."""
    runs = side_by_side(records)
    return [*([runs["none"]] if "none" in runs else []), *[run for name, run in runs.items() if name != "none"][:MOST]]


def _labels(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """The id of each run, and what its shuffle is called: the option, and the settings that differ."""
    table = table_of(records)
    settings = [column for column in table.columns if column.startswith("shuffle.")]
    for row in table.rows:
        settings_shown = [f"{c.rpartition('.')[2]}={text(c, row[c])}" for c in settings if row.get(c) is not None]
        yield row["id"], ", ".join([str(row.get("shuffle") or "-"), *settings_shown])


def input_names(record: Record) -> list[str]:
    """The inputs of a run, each by the first layer that reads it, in the order of the layers."""
    from safetensors import safe_open

    with safe_open(record["folder"] / "channels.safetensors", framework="np") as file:
        entries = set(file.keys())
    names = [layer.get("name") for layer in record.get("layers", [])]
    return [name for name in names if f"norm/{name}" in entries]


def chosen(names: Sequence[str], layer: str | None) -> str:
    if layer is not None:
        found = [name for name in names if layer in name]
        if not found:
            raise Mistake(f"no input is read first by a layer called {layer!r}; there is {', '.join(names)}")
        return found[0]
    blocks = sorted({block_of(name) for name in names})
    return next(name for name in names if block_of(name) == blocks[len(blocks) // 2])


def read_input(record: Record, name: str) -> Input:
    from safetensors import safe_open

    folder = record["folder"]
    with safe_open(folder / "channels.safetensors", framework="np") as file:
        values = {kind: file.get_tensor(f"{kind}/{name}") for kind in KINDS}
    order_I, (entry, _, expert) = None, name.partition("[")
    if (folder / "orders.safetensors").is_file():
        with safe_open(folder / "orders.safetensors", framework="np") as file:
            key = entry if expert else f"{name}.weight"
            if key in file.keys():  # noqa: SIM118
                order_I = file.get_tensor(key)[int(expert[:-1])] if expert else file.get_tensor(key)
                if sorted(order_I.tolist()) != list(range(len(values["norm"]))):
                    raise Mistake(f"{folder / 'orders.safetensors'}, {key}: not an order of the channels, damaged")
    pattern = next(layer.get("pattern", "") for layer in record["layers"] if layer["name"] == name)
    groups = re.match(r"\d+:(\d+)", pattern)
    return Input(name, values, order_I, int(groups[1]) if groups else None)
