"""The end of a sweep: the table of its runs, and how to upload them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esparse.cli.call import FAILED, FINISHED
from esparse.jobs import run_states
from esparse.records.report import finished

log = logging.getLogger("esparse")


def end_of_sweep(sweep: Path, names: Mapping[Path, str], states: Mapping[Path, run_states.State]) -> int:
    """Prints the table of all runs, and how to upload them; the exit code."""
    records = [record for folder in names if (record := finished(folder)) is not None]
    missing = [
        ("failed" if state.kind in run_states.FAILED else "not finished", name, state.text)
        for folder, name in names.items()
        if (state := states[folder]).kind != "finished"
    ]
    print_table(records, missing)
    if offline := [run for folder in names for run in sorted(folder.glob("wandb/offline-run-*"))]:
        list_of_runs = sweep / "wandb-runs.txt"
        list_of_runs.write_text("".join(f"{run.absolute()}\n" for run in offline))
        log.info("to upload these runs to W&B: xargs -d '\\n' wandb sync < %s", shlex.quote(str(list_of_runs)))
    return FAILED if missing else FINISHED


def print_table(records: list[dict[str, Any]], missing: list[tuple[str, str, str]]) -> None:
    """The table of these runs on the terminal, with the runs that it lacks below it."""
    from rich.console import Console

    from esparse.reports.writing import runs_table

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=160)
    console.print(runs_table(records, missing))
