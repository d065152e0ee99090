"""Runs on a node some runs of a sweep, one after the other in one process.

Submitit pickles the names here and nothing else: settings are read from sweep.json, the state of each run from its
folder. A job that Slurm restarts, with or without warning, therefore does the rest of the work.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """The runs of a sweep folder with these ids."""

    sweep: str
    ids: tuple[str, ...]

    def __call__(self) -> None:
        from esparse.cli.attempt import carry_out
        from esparse.cli.main import log_to_terminal, mistakes
        from esparse.sweeps.folder import Folder

        log_to_terminal()
        sweep = Folder.read(Path(self.sweep))
        os.chdir(sweep.cwd)
        failed, runs = [], sweep.chosen(self.ids)
        for i, run in enumerate(runs):
            with mistakes():
                experiment = sweep.experiment(run)
            # Its earlier record, if it was one to repeat, was removed when it was submitted.
            to_come = [(later.folder, later.settings | {"rerun": False}) for later in runs[i + 1 :]]
            if carry_out(experiment, run.settings, sweep=sweep.path, to_come=to_come) is None:
                failed.append(f"{run.name} ({run.id})")
        if failed:  # so that Slurm, too, calls the job failed
            raise RuntimeError(f"{len(failed)} of {len(self.ids)} runs have no record: {', '.join(failed)}")

    def checkpoint(self) -> Any:
        """Called in the signal's handler, before submitit puts the job back into the queue and ends this process."""
        from submitit.helpers import DelayedSubmission

        from esparse.cli.call import call

        call.preempted = True
        return DelayedSubmission(self)
