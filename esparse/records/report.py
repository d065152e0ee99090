"""The run record: what was asked, what was measured, and its place on disk. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from esparse.records.groups import GROUPS

# Where and how a run is carried out, not what it is: changing these asks for the same run.
NOT_IDENTITY = {"output_root", "rerun", "dry_run", "snapshot_seconds", "choices", "bench.cache"}
NOT_IDENTITY |= {f"model.{how}" for how in ("devices", "batch_tokens", "store", "activations")}
NOT_IDENTITY |= {name for name, group in GROUPS.items() if not group.identity}


@dataclass(slots=True)
class LayerReport:
    """How one matrix was pruned.

    kept_score: share of the matrix's total score that survived (0 to 1). relative_error:
    ||X (W - W')^T||_F / ||X W^T||_F on `error_tokens` evenly spaced calibration tokens, None where no token came.
    Bytes: of the dense matrix, and of the packed one in memory and on disk, None where `export=packed` leaves it dense
    (patterns without n:m, experts with outliers and a shuffle). zeros_before: share of dense weights that were zero;
    zeros_filled: share of those that are no longer zero behind the update.
    """

    name: str
    shape: list[int]
    density: float
    kept_score: float
    relative_error: float | None
    error_tokens: int
    seconds: float
    pattern: str = ""
    dense_bytes: int = 0
    packed_bytes: int | None = None
    file_bytes: int | None = None
    zeros_before: float = 0.0
    zeros_filled: float = 0.0


@dataclass(slots=True)
class RecoveryReport:
    """What a recovery that minimises a loss made of one part of the model.

    `before` and `after`: its loss over all calibration sequences; `steps` of the optimiser.
    """

    name: str
    loss: str
    before: float
    after: float
    steps: int
    seconds: float


@dataclass(slots=True)
class Stages:
    """Wall-clock seconds by stage of a run; `settle` waits for the device's queue before a clock is read."""

    settle: Callable[[], None] = lambda: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.settle()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.settle()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def run_id(config: Mapping[str, Any]) -> str:
    """Eight hex digits of what was asked: a digest of `identity`."""
    return sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]


def identity(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """What was asked: the resolved configuration without NOT_IDENTITY and without parts that ask for nothing.

    Such parts (bench, export, zeroshot, profile) enter only if enabled, so that ids from older versions stay valid.
    """
    kept = {}
    for key, value in config.items():
        if path + key not in NOT_IDENTITY and not asks_for_nothing(path + key, value):
            kept[key] = identity(value, f"{path}{key}.") if isinstance(value, dict) else value
    return kept


def asks_for_nothing(path: str, value: Any) -> bool:
    """Whether a setting is as if there were none: a run is then what it was before esparse had the setting."""
    if path in ("calibration.bos", "evaluate.bos"):  # settings that came later: as they are by themselves, a run is
        return bool(value == "auto")  # what it was without them
    if path in ("calibration.chat", "evaluate.chat"):
        return not value
    if path == "profile":
        return not value
    return path in GROUPS and GROUPS[path].idle(value)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that appears whole or not at all."""
    write_whole(path, lambda draft: draft.write_text(json.dumps(content, indent=1) + "\n"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a draft beside `path` and moves it into place once it is on disk.

    Raises OSError naming the file, for instance where the disk is full; the draft is gone then.
    """
    draft = path.with_name(f"{path.name}.part")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # of any new file; safetensors would let nobody else read its own
        write(draft)
        draft.chmod(mode)
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)
    except Exception as error:  # safetensors reports a full disk with an exception of its own
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk: after a power loss, a later file is never there without the earlier ones."""
    with contextlib.suppress(OSError):  # some file systems do not let folders be opened, or synced
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run, or None; a damaged one counts as not finished."""
    try:
        record = json.loads((folder / "result.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and record.get("status") == "finished" else None


def as_dicts(reports: Sequence[LayerReport | RecoveryReport]) -> list[dict[str, Any]]:
    return [asdict(report) for report in reports]
