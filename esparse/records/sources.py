"""Digests of the files that a run reads: texts, questions and a local model's files.

A run's id says which paths were asked for, not what they hold. So the record keeps digests, and when the same run is
asked again its files are compared. Reading hundreds of gigabytes for that takes minutes, so that a stamp of the file is
compared first: size, time of change, number. The system alone sets the time of change (ctime), whatever a program
claims about a file's age, and so a stamp that is the same means the same bytes; a stamp that differs means that the
digests decide. Standard library only.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL_FILES = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".txt", ".py")  # in a model's folder
ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN = ASSETS / "tiny"
CORPUS = ASSETS / "corpus" / "passages.jsonl.gz"  # the built-in corpus
READS_CORPUS = ("calibration.corpus", "evaluate.corpora", "zeroshot.tasks")  # settings that may name `builtin`

_digests: dict[tuple[str, tuple[int, ...]], str] = {}  # of this process, so that a sweep reads a model once


@dataclass(slots=True)
class Sources:
    """The files of one run, by setting and by name; digests are computed in the background."""

    files: dict[str, dict[str, Path]]
    _stamps: dict[Path, list[int] | None] = field(default_factory=dict)
    _digests: dict[Path, str | None] = field(default_factory=dict)
    _reader: threading.Thread | None = None

    @classmethod
    def begin(cls, config: Mapping[str, Any]) -> Sources:
        """Takes stamps now, before the run reads its files, and computes digests while the run works."""
        sources = cls(files_of(config))
        paths = [path for by_name in sources.files.values() for path in by_name.values()]
        sources._stamps = {path: stamp(path) for path in paths}
        sources._reader = threading.Thread(target=sources._read, daemon=True)
        sources._reader.start()
        return sources

    def _read(self) -> None:
        for path in self._stamps:
            try:
                self._digests[path] = digest(path)
            except OSError:  # said where the run itself reads it, or it has vanished since
                self._digests[path] = None

    def record(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The section `sources` of the record; a file that changed while it was read has no digest."""
        assert self._reader is not None
        self._reader.join()
        return {
            setting: {name: self._entry(path) for name, path in by_name.items()}
            for setting, by_name in self.files.items()
        }

    def _entry(self, path: Path) -> dict[str, Any]:
        before, now = self._stamps[path], stamp(path)
        whole = self._digests[path] if before == now else None
        return {"sha256": whole, "stamp": before}


def files_of(config: Mapping[str, Any]) -> dict[str, dict[str, Path]]:
    """The existing files that a resolved configuration names, by setting and by name."""
    found = {}
    for setting in ("calibration.path", "evaluate.path", "zeroshot.data", "model.path"):
        group, _, name = setting.partition(".")
        given = (config.get(group) or {}).get(name)
        if not given or (group == "zeroshot" and not config[group]["tasks"]):
            continue
        path = BUILTIN if (setting, given) == ("model.path", "builtin") else Path(given).expanduser()
        if path.is_file():
            found[setting] = {path.name: path}
        elif path.is_dir() and setting == "model.path":
            found[setting] = {f.name: f for f in sorted(path.iterdir()) if f.suffix in MODEL_FILES and f.is_file()}
        elif path.is_dir() and setting == "zeroshot.data":
            found[setting] = {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file()}
    return found | {setting: {CORPUS.name: CORPUS} for setting in READS_CORPUS if _reads_corpus(config, setting)}


def _reads_corpus(config: Mapping[str, Any], setting: str) -> bool:
    group, _, name = setting.partition(".")
    named = (config.get(group) or {}).get(name) or ()
    return "builtin" in ([named] if isinstance(named, str) else named)


def changed(recorded: Mapping[str, Mapping[str, Mapping[str, Any]]], config: Mapping[str, Any]) -> list[str]:
    """The differences from the record's `sources`, as texts; none for a setting whose files are all gone."""
    differ = []
    for setting, now in files_of(config).items():
        before = recorded.get(setting)
        if before is None:
            if setting in READS_CORPUS:  # until 2026-11-28 the corpus was the running Python's library
                differ.append(f"{setting}: the built-in corpus was another one then")
            continue
        for name in sorted(set(before) | set(now)):
            if name not in now:
                differ.append(f"{setting}: {name} is gone")
            elif name not in before:
                differ.append(f"{setting}: {name} is new")
            elif not _same(before[name], now[name]):
                differ.append(f"{setting}: {now[name]} holds something else")
    return differ


def _same(before: Mapping[str, Any], path: Path) -> bool:
    if before["sha256"] is None:  # it changed while the run read it
        return False
    return before["stamp"] == stamp(path) or before["sha256"] == digest(path)


def stamp(path: Path) -> list[int] | None:
    """Size, time of change (ns) and number of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_ctime_ns, found.st_ino]


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes. Raises OSError if it cannot be read."""
    key = str(path.absolute()), tuple(stamp(path) or ())
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]
