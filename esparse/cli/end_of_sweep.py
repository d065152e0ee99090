"""The end of a sweep: the table of its runs, and how to upload them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esparse.cli.call import FAILED, FINISHED
from esparse.cli.earlier import differs
from esparse.jobs import run_states
from esparse.records.groups import display_name
from esparse.records.report import finished
from esparse.run.tracking import offline_runs

log = logging.getLogger("esparse")


def end_of_sweep(sweep: Path, runs: Mapping[Path, Mapping[str, Any]], states: Mapping[Path, run_states.State]) -> int:
    """Prints the table of all runs, and how to upload them; the exit code. `runs`: folder -> settings."""
    records: dict[Path, dict[str, Any]] = {}
    missing = []
    for folder, settings in runs.items():
        state, record = states[folder], finished(folder)
        why = None if record is None else differs(record, settings)
        if why is not None:
            missing.append(("failed", display_name(settings), f"was run before ({folder}), {why}"))
        elif record is not None:
            records[folder] = record
        if state.kind != "finished":
            missing.append(
                ("failed" if state.kind in run_states.FAILED else "not finished", display_name(settings), state.text)
            )
    print_table(list(records.values()), missing)
    say_places(records)
    if offline := [run for folder in runs for run in offline_runs(folder, folder.name)]:
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
    console.print(runs_table(records, missing, width=console.width))


def say_places(records: Mapping[Path, Mapping[str, Any]]) -> None:
    """Where the records lie, and where the exports, and how large these are. `records`: by the folders of the runs."""
    places = [folder / "result.json" for folder in records]
    if len(places) > 1:
        places = list(dict.fromkeys(folder.parent / "ID" / "result.json" for folder in records))
    if places:
        log.info("%s: %s", "record" if len(records) == 1 else "records", ", ".join(map(str, places)))
    for record in records.values():
        if export := record.get("export"):
            log.info("export: %s (%s, %s)", export["path"], export["format"], _size(export["bytes"]))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
