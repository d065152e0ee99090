"""What stands behind a row of the page: where a run's files are, what it was, how it went, and its layers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from esparse.reports.reading import Record, at
from esparse.reports.table import exact, mean
from esparse.reports.tabulate import scored_by, table_of

FILES = {"record": "result.json", "log": "run.log", "W&B files": "wandb", "folder": "."}
VERSIONS = ("esparse", "python", "torch", "transformers", "lm_eval")
PLACE = ("device", "threads", "host")
# Of a layer, what the page shows: its name in a record, and significant digits.
VALUES = {"density": 4, "relative_error": 4, "kept_score": 4, "seconds": 3}


def run_facts(records: Sequence[Record], *, start: Path, corpus: str | None = None) -> dict[str, Any]:
    """All runs by id, the settings that they share, and the names and shapes of their layers, each list once.

    Links are relative to `start`, the folder of the page.
    """
    settings = {record["id"]: flat_settings(record["config"]) for record in records}
    paths = list(dict.fromkeys(path for of_run in settings.values() for path in of_run))
    same = [path for path in paths if len({exact(of_run.get(path)) for of_run in settings.values()}) == 1]
    first = next(iter(settings.values()), {})
    table = table_of(records, corpus=corpus)
    measured = {
        row["id"]: {c: table.text(c, row[c]) for c in table.measured if row.get(c) is not None} for row in table.rows
    }
    scored = {row["id"]: scored_by(row, table) for row in table.rows}
    shapes: list[dict[str, Any]] = []
    runs = {}
    for record in records:
        identity = record["id"]
        runs[identity] = {
            "name": record.get("name") or identity,
            "links": _links(record, start),
            "facts": _facts(record),
            "settings": {path: value for path, value in settings[identity].items() if path not in same},
            "measured": measured[identity],
            "scored": scored[identity],
            "layers": _layers(record, shapes),
        }
    return {"runs": runs, "shared": {path: first[path] for path in same}, "shapes": shapes}


def flat_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The whole configuration by path, as text: metric = entropy, metric.alpha = 1.0."""
    flat: dict[str, Any] = {group: str(option) for group, option in (config.get("choices") or {}).items()}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif not key.startswith("_"):
                flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)

    add("", {key: value for key, value in config.items() if key != "choices"})
    return flat


def _links(record: Record, start: Path) -> list[list[str]]:
    """What there is of a run on disk, as label and address."""
    if "folder" not in record:
        return []
    files = [(label, record["folder"] / file) for label, file in FILES.items() if (record["folder"] / file).exists()]
    return [[label, address(path, start)] for label, path in files]


def address(path: Path, start: Path) -> str:
    """A link from a page in `start`: relative, or whole where there is no way, as from one drive to another."""
    try:
        return quote(Path(os.path.relpath(path.resolve(), start.resolve())).as_posix())
    except ValueError:
        return path.resolve().as_uri()


def _facts(record: Record) -> list[list[str]]:
    """Label and text of what a record says of a run beside its settings and numbers."""
    environment = record.get("environment") or {}
    versions = [f"{name} {environment[name]}" for name in VERSIONS if environment.get(name)]
    place = [f"{environment[n]} threads" if n == "threads" else environment[n] for n in PLACE if environment.get(n)]
    stages = [f"{stage} {s:.4g}" for stage, s in (record.get("seconds_by_stage") or {}).items() if s >= 0.05]
    sparsity, exported = record["sparsity"], record.get("export") or {}
    holds = sparsity.get("pattern_holds")
    facts = {
        "started": str(record.get("started") or "").replace("T", " "),
        "took": f"{record['seconds']:.1f} s" + (f": {', '.join(stages)}" if stages else ""),
        "commit": str(environment.get("commit") or ""),
        "versions": ", ".join(versions),
        "on": ", ".join(map(str, place)),
        "went on after": ", ".join(map(str, record.get("resumed") or [])),
        "pattern holds": "" if holds is None else "yes" if holds else "no",
        "size": _size(record),
        "export": f"{exported['format']}, {exported['bytes']:,} bytes" if {"format", "bytes"} <= set(exported) else "",
    }
    return [[label, text] for label, text in facts.items() if text]


def _size(record: Record) -> str:
    pruned, all_of_it = at(record, "model.pruned_parameters"), at(record, "model.parameters")
    return f"{pruned:,} of {all_of_it:,} parameters were pruned" if pruned and all_of_it else ""


def _layers(record: Record, shapes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The layers of a run by column; those of many experts are one, as a mean: nobody reads thousands of rows."""
    merged: dict[str, list[dict[str, Any]]] = {}
    for layer in record.get("layers") or []:
        merged.setdefault(re.sub(r"\[\d+\]$", "", layer.get("name") or ""), []).append(layer)
    if not merged:
        return None
    names = [f"{name} ({len(of)} experts, mean)" if len(of) > 1 else name for name, of in merged.items()]
    layers = list(merged.values())
    own = {"names": names, "shapes": [" × ".join(map(str, of[0].get("shape") or [])) for of in layers]}
    if own not in shapes:
        shapes.append(own)
    columns: dict[str, Any] = {"of": shapes.index(own)}
    patterns = [of[0].get("pattern") or "" for of in layers]
    if len(set(patterns)) > 1:
        columns["pattern"] = patterns
    for field, digits in VALUES.items():
        values = [mean(layer.get(field) for layer in of) for of in layers]
        if any(value is not None for value in values):
            columns[field] = [shortened(value, digits) for value in values]
    return columns


def shortened(value: float | None, digits: int = 4) -> float | None:
    """With few digits, so that many of them are a small file; None for what JSON has no word for."""
    rounded = None if value is None else float(f"{value:.{digits}g}")
    return rounded if rounded is not None and abs(rounded) < float("inf") else None
