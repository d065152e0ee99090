"""A sweep's folder: OUTPUT_ROOT/sweeps/<time>/sweep.json says what its runs are and how they were submitted.

Paths in it are relative to the folder, so that it means the same on every machine that mounts it somewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esparse.cli import registry
from esparse.records.groups import display_name
from esparse.records.report import run_id, write_json
from esparse.run.settings import Experiment


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a sweep; `folder` is where its record will be."""

    id: str
    name: str
    folder: Path
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Folder:
    """`executor`: slurm or local, with `launcher`'s settings; `cwd`: where relative paths of the settings begin."""

    path: Path
    executor: str
    launcher: dict[str, Any]
    cwd: Path
    runs: list[Run]

    @classmethod
    def create(cls, path: Path, executor: str, launcher: dict[str, Any], asked: Iterable[Mapping[str, Any]]) -> Folder:
        """The folder of a new sweep; a run that was asked twice is one."""
        path = path.absolute()
        runs = {}
        for settings in map(dict, asked):
            folder = Path(settings["output_root"]).absolute() / run_id(settings)
            runs[folder] = Run(run_id(settings), display_name(settings), folder, settings)
        sweep = cls(path, executor, launcher, Path.cwd(), list(runs.values()))
        path.mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": r.id, "name": r.name, "folder": _relative(r.folder, path), "settings": r.settings}
            for r in sweep.runs
        ]
        content = {"executor": executor, "launcher": launcher, "cwd": str(sweep.cwd), "runs": rows}
        write_json(path / "sweep.json", content)
        return sweep

    @classmethod
    def read(cls, path: Path) -> Folder:
        """Reads the sweep; raises FileNotFoundError if no sweep was submitted from this folder."""
        path = path.absolute()
        stored = json.loads((path / "sweep.json").read_text())
        runs = [
            Run(row["id"], row["name"], Path(os.path.normpath(path / row["folder"])), row["settings"])
            for row in stored["runs"]
        ]
        return cls(path, stored["executor"], stored["launcher"], Path(stored["cwd"]), runs)

    def chosen(self, ids: Iterable[str]) -> list[Run]:
        by_id = {run.id: run for run in self.runs}
        return [by_id[i] for i in ids]

    def experiment(self, run: Run) -> Experiment:
        """Raises ValueError for a wrong setting, for instance after an update of esparse."""
        # rerun: what there was of the run was removed when it was submitted; a job that begins anew must go on.
        where = {"output_root": str(run.folder.parent), "rerun": False}
        return registry.rebuilt(run.settings | where)


def _relative(folder: Path, base: Path) -> str:
    return os.path.relpath(folder, base)
