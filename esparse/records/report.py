"""The run record: its parts, the run's id, and reading and writing on disk. Standard library only."""

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

# Settings of where and how a run is carried out: changing them asks for the same run.
NOT_IDENTITY = {"output_root", "rerun", "dry_run", "snapshot_seconds", "choices", "bench.cache"}
NOT_IDENTITY |= {f"model.{how}" for how in ("devices", "batch_tokens", "store", "activations")}
NOT_IDENTITY |= {name for name, group in GROUPS.items() if not group.identity}


@dataclass(slots=True)
class LayerReport:
    """The report of one pruned matrix.

    kept_score: share of the matrix's total score that is kept (0 to 1). relative_error:
    ||X (W - W')^T||_F / ||X W^T||_F on `error_tokens` evenly spaced calibration tokens, None without tokens.
    Bytes: of the dense matrix, and of the packed one in memory and on disk, None if `export=packed` leaves it dense
    (patterns without n:m, unless they are quantised and dense; experts with outliers and a shuffle, or that a model
    takes all at once). zeros_before: share of zeros in the dense weights;
    zeros_filled: share of these that an update or a training has made nonzero; zeros_in_mask: number of those that the
    mask keeps. density and zeros_filled are those of the weights at the end.
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
    zeros_in_mask: int = 0


@dataclass(slots=True)
class RecoveryReport:
    """The report of a recovery that trained one part of the model.

    `before` and `after`: the loss over all calibration sequences; `steps`: of the optimiser.
    """

    name: str
    loss: str
    before: float
    after: float
    steps: int
    seconds: float


def nothing_to_wait_for() -> None:
    """What a stage waits for on a CPU; a name, so that what holds it can be pickled."""


@dataclass(slots=True)
class Stages:
    """Wall-clock seconds by stage of a run; `settle` waits for the device's queue before a clock is read."""

    settle: Callable[[], None] = nothing_to_wait_for
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


# Settings that came later, with the value by which a run is the one that it was without them.
LATER = {
    "calibration.bos": "auto",
    "calibration.chat": False,
    "evaluate.bos": "auto",
    "evaluate.chat": False,
    "profile": False,
    "recovery.first.scaled": False,
    "recovery.scaled": False,
    "recovery.second.scaled": False,
    "shuffle.foldable": False,
}


def run_id(config: Mapping[str, Any]) -> str:
    """The run's id: eight hex digits of a digest of `identity`."""
    return sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]


def identity(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """What identifies a run: the resolved configuration without NOT_IDENTITY and without parts that have no effect.

    Such parts (bench, export, zeroshot, profile) enter only if enabled, so that ids from older versions stay valid.
    """
    kept = {}
    for key, value in config.items():
        if path + key not in NOT_IDENTITY and not asks_for_nothing(path + key, value):
            kept[key] = identity(value, f"{path}{key}.") if isinstance(value, dict) else value
    return kept


def asks_for_nothing(path: str, value: Any) -> bool:
    """Whether a setting has no effect, so that the run is the one from before esparse had the setting."""
    if path in LATER:
        return bool(value == LATER[path])
    return path in GROUPS and GROUPS[path].idle(value)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that appears complete or not at all."""
    write_whole(path, lambda draft: draft.write_text(json.dumps(content, indent=1) + "\n"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a draft beside `path`, and moves the draft to `path` after it is on disk.

    Raises OSError with the file's name, for instance if the disk is full, and removes the draft.
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
    """Flushes a folder to disk, so that after a power loss no later file exists without the earlier ones."""
    with contextlib.suppress(OSError):  # some file systems do not let folders be opened, or synced
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


WHOLE = {"id": str, "config": dict, "model": dict, "sparsity": dict, "quality": dict}  # what every record has


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run, or None; a damaged record counts as unfinished."""
    record = read_json(folder / "result.json")
    is_whole = all(isinstance(record.get(part), kind) for part, kind in WHOLE.items())
    return record if is_whole and record.get("status") == "finished" else None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of a run holds; empty if there is no such file, or a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # no JSON, or no UTF-8
        return {}
    return content if isinstance(content, dict) else {}


def as_dicts(reports: Sequence[LayerReport | RecoveryReport]) -> list[dict[str, Any]]:
    return [asdict(report) for report in reports]
