"""Reads records from a folder, and checks that they have the fields that tables need."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esparse.records.groups import GROUPS

Record = dict[str, Any]

NUMBER = (int, float)
# The fields of a record that tables need, with their types.
NEEDED: dict[str, Any] = {
    "id": str,
    "name": str,
    "config": dict,
    "model.name": str,
    "sparsity.pattern": str,
    "sparsity.density": NUMBER,
    "quality": dict,
    "seconds": NUMBER,
}


def read_records(root: Path) -> list[Record]:
    """All finished records below `root`, each with its `folder`; a damaged one is named on stderr and left out."""
    records = []
    for path in sorted(root.rglob("result.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            fault = _fault(record)
        except ValueError:
            fault = "it is not whole JSON"
        except OSError as error:
            fault = error.strerror or type(error).__name__
        if fault:
            print(f"esparse: {path} is left out: {fault}", file=sys.stderr)
        else:
            records.append(record | {"folder": path.parent})
    return records


def _fault(record: Any) -> str | None:
    """The first missing or wrong field of a record, or None."""
    if not isinstance(record, dict):
        return "it is not a record"
    if record.get("status", "finished") != "finished":
        return f"its status is {record['status']!r}"
    for path, kind in NEEDED.items():
        if not isinstance(at(record, path), kind):
            return f"its field {path} is missing or not what it should be"
    config = record["config"]
    settings = {part: config[part] for part in GROUPS if part in config}
    of_wrong_kind = [part for part, value in settings.items() if not isinstance(value, dict)]
    if not isinstance(config.get("choices", {}), dict):
        of_wrong_kind.append("choices")
    if not isinstance(config.get("outliers", ""), str | None):
        of_wrong_kind.append("outliers")
    if "tasks" not in (settings.get("zeroshot", {"tasks": []}) or {}):
        of_wrong_kind.append("zeroshot")
    if of_wrong_kind:
        return f"its field config.{of_wrong_kind[0]} is not what it should be"
    for part, kind in (("layers", list), ("memory", dict), ("zeroshot", dict)):
        if not isinstance(record.get(part, kind()), kind):
            return f"its field {part} is not what it should be"
    tests = [("quality", record["quality"]), ("zeroshot", record.get("zeroshot", {}))]
    for part, values in tests:
        for name, value in values.items():
            for which in ("dense", "pruned"):
                if not isinstance(value, dict) or not isinstance(value.get(which, ""), (*NUMBER, type(None))):
                    return f"its field {part}.{name}.{which} is missing or not a number"
    if not all(isinstance(layer, dict) for layer in record.get("layers", [])):
        return "its field layers is not what it should be"
    return None


def at(record: Any, path: str) -> Any:
    """The value at a path like model.name; None if there is none."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def keys(records: Sequence[Record], field: str) -> list[str]:
    """The corpora or tasks that some record has, in the order in which they come."""
    return list(dict.fromkeys(key for record in records for key in record.get(field, {})))


def stop(sentence: str, code: int) -> int:
    """Prints why a command ends; returns its exit code."""
    print(f"esparse: {sentence}", file=sys.stderr)
    return code
