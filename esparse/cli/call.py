"""The state of this command-line call. A sweep's jobs may run in other processes, each with its own call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FINISHED, FAILED, MISTAKE = 0, 1, 2  # exit codes


@dataclass(slots=True)
class Call:
    """The state of the call so far.

    `begun`: a run has begun, so that what goes wrong is no mistake on the command line. `sweep`: its name. `runs`: of
    a sweep, as they were checked: overrides -> resolved settings. `submitted`: they are in a queue, and are not waited
    for. `preempted`: the job of this process is about to be put back into the queue. `again`: the next run of this
    process prunes the same model. `place`: which run of a sweep is at work, in words.
    """

    code: int = FINISHED
    begun: bool = False
    sweep: str | None = None
    runs: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    submitted: bool = False
    preempted: bool = False
    again: bool = False
    place: str = ""


call = Call()
