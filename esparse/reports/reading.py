"""Reads records from a folder, and checks that they have the fields that tables need."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esparse.errors import Mistake
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
NUMBER_OR_NONE = (*NUMBER, type(None))
TIMED = ("tokens", "dense_ms", "sparse_ms", "speedup", "limit_speedup", "share_of_limit")
DIGITS = 300  # of a whole number that a float can still hold
DICT_OR_NONE, LIST_OR_NONE = (dict, type(None)), (list, type(None))
# Fields that a record may lack, with the type of each and, below it, of what it holds.
MAY_HAVE: dict[str, Any] = {
    "config.choices.*": str,
    "config.evaluate.max_tokens": NUMBER_OR_NONE,
    "config.zeroshot.limit": NUMBER_OR_NONE,
    "environment": DICT_OR_NONE,
    "export": DICT_OR_NONE,
    "latency": LIST_OR_NONE,
    "latency.*": dict,
    **{f"latency.*.{of}": NUMBER_OR_NONE for of in TIMED},
    **{f"latency.*.{of}": (str, type(None)) for of in ("layer", "dtype", "kernel", "why_not")},
    "layers": list,
    "layers.*": dict,
    "layers.*.name": str,
    "layers.*.shape": list,
    "layers.*.shape.*": int,
    **{f"layers.*.{of}": NUMBER_OR_NONE for of in ("density", "kept_score", "relative_error", "seconds")},
    "memory": dict,
    **{f"memory.{of}": NUMBER_OR_NONE for of in ("bits_per_weight", "metadata_bits", "order_bytes")},
    **{f"memory.{of}": NUMBER_OR_NONE for of in ("peak_host_mib", "peak_device_mib")},
    "memory.*": (*NUMBER_OR_NONE, dict),
    "memory.bits.*": NUMBER_OR_NONE,
    "model.parameters": NUMBER,
    "model.pruned_parameters": NUMBER,
    "quality.*.tokens": NUMBER,
    "quality.*.sequence_length": NUMBER,
    "profile": DICT_OR_NONE,
    "profile.rows": list,
    "profile.rows.*": dict,
    "profile.rows.*.kind": str,
    "profile.rows.*.name": str,
    "profile.thresholds": list,
    "profile.thresholds.*": NUMBER,
    "resumed": LIST_OR_NONE,
    "seconds_by_stage": DICT_OR_NONE,
    "seconds_by_stage.*": NUMBER,
    "sources": DICT_OR_NONE,
    "zeroshot": dict,
    "zeroshot.*": dict,
    "zeroshot.*.n": NUMBER,
    "zeroshot.*.stderr": NUMBER_OR_NONE,
}
# Of which a record with the first has the second.
TOGETHER = {"memory.bits": "memory.bits_per_weight", "profile": "profile.rows", "profile.rows": "profile.thresholds"}


def read_records(root: Path) -> list[Record]:
    """All finished records below `root`, each with its `folder`.

    Named on stderr: a damaged one and a copy, which are left out, and a run that was carried out twice.
    """
    records = []
    of_run: dict[str, Path] = {}  # by id
    twice: list[tuple[Path, Path]] = []  # a record, and the first one of the same run
    first: dict[bytes, Path] = {}  # by their contents: a copy or a link would count as one run more in a mean
    # rglob does not go through links, by which runs of several roots may be gathered in one folder
    for path in sorted(
        {*root.rglob("result.json"), *root.glob("*/result.json")}, key=lambda path: (len(path.parts), path)
    ):
        try:
            content = path.read_bytes()
            record = json.loads(content.decode("utf-8"), parse_int=_whole)
            fault = _fault(record)
            if fault is None and first.setdefault(content, path) != path:
                fault = f"it is {first[content]} once more"
        except Mistake as error:
            fault = str(error)
        except (ValueError, RecursionError):
            fault = "it is not whole JSON"
        except OSError as error:
            fault = error.strerror or type(error).__name__
        if fault:
            print(f"esparse: {path} is left out: {fault}", file=sys.stderr)
            continue
        if of_run.setdefault(record["id"], path) != path:
            twice.append((path, of_run[record["id"]]))
        records.append(record | {"folder": path.parent})
    if twice:
        (path, earlier), others = twice[0], f"; {len(twice) - 1} more are so" if twice[1:] else ""
        said = f"{path} is the run of {earlier}, carried out again{others}: a mean counts each"
        print(f"esparse: {said}", file=sys.stderr)
    return records


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise Mistake(f"it holds a number of {len(digits)} digits")
    return int(digits)


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
    tasks = settings.get("zeroshot", {"tasks": []})
    if isinstance(tasks, dict) and "tasks" not in tasks:
        of_wrong_kind.append("zeroshot")
    if of_wrong_kind:
        return f"its field config.{of_wrong_kind[0]} is not what it should be"
    for path, kind in MAY_HAVE.items():
        if (place := _misplaced(record, path.split("."), kind)) is not None:
            return f"its field {place} is not what it should be"
    for path, other in TOGETHER.items():
        if at(record, path) is not None and at(record, other) is None:
            return f"its field {other} is missing, and it has {path}"
    profile = record.get("profile") or {"rows": [], "thresholds": []}
    shares = [f"{which} {threshold:g}" for which in ("dense", "pruned") for threshold in profile["thresholds"]]
    for number, row in enumerate(profile["rows"]):
        wrong = [name for name in ("kind", "name") if name not in row]
        wrong += [name for name in shares if not isinstance(row.get(name), NUMBER)]
        if wrong:
            return f"its field profile.rows.{number}.{wrong[0]} is missing or not what it should be"
    tests = [("quality", record["quality"]), ("zeroshot", record.get("zeroshot", {}))]
    for part, values in tests:
        for name, value in values.items():
            for which in ("dense", "pruned"):
                if not isinstance(value, dict) or not isinstance(value.get(which, ""), (*NUMBER, type(None))):
                    return f"its field {part}.{name}.{which} is missing or not a number"
    return None


def _misplaced(value: Any, path: Sequence[str], kind: Any, at: str = "") -> str | None:
    """Where below `value` something is of another type than `kind`; `*` in a path stands for all keys or places."""
    if not path:
        return None if isinstance(value, kind) else at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = ((key, one) for key, one in items if path[0] in ("*", key))
    found = (_misplaced(one, path[1:], kind, f"{at}.{key}".lstrip(".")) for key, one in inside)
    return next((place for place in found if place is not None), None)


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
