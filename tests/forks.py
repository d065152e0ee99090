"""Programs that begin in milliseconds: a server process has imported the libraries, and forks a child for each.

A child is a process like any other, with its output, its exit code, its end by a signal, and the state of every module
as its import left it. It does not show what a program does until its imports are over: `workshop.launch_anew` does.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

import rich.progress  # noqa: F401
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

import esparse.cli.attempt
import esparse.cli.sweep_check

# Imported once, for all children.
import esparse.evaluate.perplexity
import esparse.evaluate.zeros
import esparse.pruning.prune
import esparse.reports.command
import esparse.run.experiment  # noqa: F401

Plugins.instance()  # Hydra looks for them once
OverridesParser.create().parse_overrides(["a=b,c", "d=[1]", "e=${f}"])  # and learns how to read
gc.freeze()  # else a collection in a child would copy all that the server holds
SECONDS = 300


def server() -> ForkServerContext:
    """Where processes are forked from; one for each process of the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def run(*command: object, cwd: Path | None = None, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """What `python COMMAND` does and says, COMMAND being a file or `-m` and a module, and what is passed to it.

    With one thread: two of them wait for each other at every small operation, ten times longer if the cores are busy.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        arguments = (words, cwd or Path.cwd(), dict(os.environ), out, err, threads)
        process = server().Process(target=_carry_out, args=arguments)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, SECONDS, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _carry_out(words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path, threads: int) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(threads)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.modules.pop(words[1], None)  # as if nobody had imported it
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a child of multiprocessing ends without them
