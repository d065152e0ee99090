"""Attempts at a run in processes of their own, which are killed at chosen moments."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from hydra import compose

from esparse.cli import attempt as one_run
from esparse.cli import registry
from esparse.cli.call import call
from tests import forks
from tests.composing import composing

CONF = Path(__file__).parent.parent / "conf"
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir"}


def attempt(overrides: list[str], kill_at: int | None, counted: Path | None) -> None:
    """Carries out a run; the process kills itself at the `kill_at`th time that it touches a file of the run.

    Without a kill the number of such times goes to the file `counted`. The process ends with launch.py's exit code.
    """
    events = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal events
        # A file that is only read cannot be left half written.
        if event in FILE_EVENTS and str(root) in str(args[0]) and (event != "open" or args[1] != "r"):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)  # as in forks.run
    with composing():
        config = compose("config", overrides, return_hydra_config=True)
    experiment = registry.build(config)
    root = Path(experiment.output_root)
    settings = registry.resolved(config, experiment, config.hydra.runtime.choices)
    logging.getLogger("esparse").setLevel(logging.INFO)
    sys.addaudithook(watch)
    one_run.carry_out(experiment, settings)
    if counted is not None:
        counted.write_text(str(events))
    sys.exit(call.code)


def start(overrides: list[str], *, kill_at: int | None = None, counted: Path | None = None) -> BaseProcess:
    process = forks.server().Process(target=attempt, args=(overrides, kill_at, counted))
    process.start()
    return process


def killed_when(process: BaseProcess, is_time: Callable[[], bool]) -> bool:
    """Kills a process as soon as it is time to; False where it ended before."""
    while process.is_alive():
        if is_time():
            process.kill()
            process.join()
            return process.exitcode == -signal.SIGKILL
        time.sleep(0.001)
    return False
