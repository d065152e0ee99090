"""The values that a tracking service gets of a run, and their names: history by block, summary, tables.

| name | what |
|---|---|
| `error/KIND`, `kept_score/KIND` | history, with `block`: the mean over the layers of that kind in a block |
| `mean_error`, `mean_kept_score` | means over all layers, as tables have them |
| `perplexity/CORPUS/dense`, `/pruned`, `/ratio` | perplexities of the same run, and pruned over dense |
| all else | as the record has it, a/b/c for nested values; lists of rows are tables |

KIND is a layer's name without its block and expert: self_attn.q_proj.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from esparse.records.report import LayerReport

Values = dict[str, Any]
# What a record calls a layer's measurements, and what charts do.
MEASURED = {"relative_error": "error", "kept_score": "kept_score"}


class BlockHistory:
    """Logs each block once, when its last layer came in; `close` the last one."""

    def __init__(self, log: Callable[[Values], None]) -> None:
        self._log = log
        self._block: int | None = None
        self._layers: list[Values] = []

    def add(self, block: int, layer: LayerReport) -> None:
        if block != self._block:
            self.close()
        self._block = block
        self._layers.append({"name": layer.name} | {field: getattr(layer, field) for field in MEASURED})

    def close(self) -> None:
        if self._layers:
            self._log({"block": self._block} | by_kind(self._layers))
        self._layers = []


def kind_of(name: str) -> str:
    """The layer's name without what comes before its block's number, that number, and experts' numbers."""
    inside = re.sub(r"^.*?\.?\d+\.", "", name, count=1)
    return re.sub(r"\.\d+(?=\.|$)|\[\d+\]$", "", inside)


def by_kind(layers: Iterable[Values]) -> Values:
    """The means over the layers of each kind, as a history names them."""
    of: dict[str, list[float]] = {}
    for layer in layers:
        for field, name in MEASURED.items():
            if layer.get(field) is not None:
                of.setdefault(f"{name}/{kind_of(layer['name'])}", []).append(layer[field])
    return {name: sum(values) / len(values) for name, values in of.items()}


def outcome(record: Values) -> Values:
    """What runs are compared by: perplexities with their ratio, and means over layers."""
    found: Values = {}
    for corpus, values in (record.get("quality") or {}).items():
        dense, pruned = values.get("dense"), values.get("pruned")
        found |= {f"perplexity/{corpus}/{which}": values[which] for which in ("dense", "pruned") if values.get(which)}
        if dense and pruned is not None:
            found[f"perplexity/{corpus}/ratio"] = pruned / dense
    for field, name in MEASURED.items():
        values = [layer[field] for layer in record.get("layers") or [] if layer.get(field) is not None]
        if values:
            found[f"mean_{name}"] = sum(values) / len(values)
    return found


def parts(record: Values) -> tuple[Values, dict[str, list[Any]]]:
    """The record as scalars and as tables by their paths; perplexities and settings are told elsewhere."""
    rest = {key: value for key, value in record.items() if key not in ("config", "sources")}
    quality = {
        corpus: {key: value for key, value in values.items() if key not in ("dense", "pruned")}
        for corpus, values in (rest.pop("quality", None) or {}).items()
    }
    scalars, tables = split(rest | {"perplexity": quality})
    if "layers" in tables:
        placed = [{"block": block_of(row["name"]), "kind": kind_of(row["name"])} for row in tables["layers"]]
        tables["layers"] = [place | row for place, row in zip(placed, tables["layers"], strict=True)]
    return scalars, tables


def block_of(name: str) -> int | None:
    """The first number in a layer's name; None if there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?=\.)", name)
    return int(found[1]) if found else None


def series(layers: Sequence[Values], field: str) -> tuple[list[list[int]], list[list[float]], list[str]]:
    """Blocks, values and names of the kinds' lines: one chart with all of them."""
    lines: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        block, value = block_of(layer["name"]), layer.get(field)
        if block is not None and value is not None and math.isfinite(value):
            lines.setdefault(kind_of(layer["name"]), {}).setdefault(block, []).append(value)
    points = [{block: sum(v) / len(v) for block, v in sorted(of.items())} for of in lines.values()]
    return [list(of) for of in points], [list(of.values()) for of in points], list(lines)


def flat(config: Values) -> Values:
    """The configuration as people filter runs by it: metric = entropy, metric/alpha = 0.5."""
    found: Values = {}

    def add(prefix: str, values: Values) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}/", value)
            elif key != "_class":
                found[f"{prefix}{key}"] = value

    add("", {key: value for key, value in config.items() if key != "choices"})
    return found | config.get("choices", {})


def split(values: Values, prefix: str = "") -> tuple[Values, dict[str, list[Any]]]:
    """Nested values as scalars and as lists of rows, both by their path, a/b/c."""
    scalars: Values = {}
    tables: dict[str, list[Any]] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            inner_scalars, inner_tables = split(value, f"{path}/")
            scalars |= inner_scalars
            tables |= inner_tables
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables[path] = value
        elif isinstance(value, bool | int | float | str):
            scalars[path] = value
    return scalars, tables
