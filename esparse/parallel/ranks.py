"""Several processes that carry out one run together, each on its own device with its own share of the sequences.

Every rank runs the same program. What it summed up over its share becomes, by a `Ranks`, what all of them saw; from
there on each computes the same. The first rank alone writes files. The process that asked for all this only watches:
it holds no device and takes part in nothing, so that it can end the ranks whatever state they are in.

Shapes: S what is dealt out (sequences, windows), N the rest.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

VALUES_AT_ONCE = 2**24  # of a float32 tensor that is summed in float64
START = "spawn"  # not a fork: a process that looked at its GPUs cannot be forked into one that uses them
GRACE = 5.0  # seconds that the other ranks have to end by themselves once one has failed


class Ranks:
    """The process that runs alone: what it has is what all have."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def before(self, count: int) -> int:
        """Of so many things that are dealt out in a row, how many the ranks before this one have."""
        return self.rank * (count // self.size) + min(self.rank, count % self.size)

    def share(self, x_SN: Tensor) -> Tensor:
        """This rank's rows: of no rank more than one above another's, maybe none."""
        return x_SN.tensor_split(self.size)[self.rank]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank; it is not called on another."""
        return make()

    def joined(self, x_SN: Tensor) -> Tensor:
        """The rows of all ranks, those of the first rank first."""
        return x_SN

    def sum_(self, x: Tensor) -> None:
        """Replaces x by its sum over the ranks, taken in float64 or in integers."""

    def min_(self, x: Tensor) -> None:
        """Replaces x by the least value that any rank has, entry by entry."""

    def max_(self, x: Tensor) -> None:
        """Replaces x by the greatest value that any rank has, entry by entry."""

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives the tensors the values that they have on the first rank, bit by bit."""

    def wait(self) -> None:
        """Returns once every rank is here."""


class RankLost(RuntimeError):
    """Another rank does not answer: it failed, and its own error says why."""


class DistributedRanks(Ranks):
    """One of several ranks: torch.distributed, with gloo for what is on the CPU and NCCL for what is on a GPU."""

    def __init__(self, rank: int, devices: Sequence[torch.device], meeting: str) -> None:
        """`meeting`: the path of a file, not yet there, by which the ranks find each other."""
        self.rank, self.size = rank, len(devices)
        with _listening():
            on_gpu = devices[rank].type == "cuda"
            if on_gpu:
                torch.cuda.set_device(devices[rank])
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=self.size,
                timeout=timedelta(days=1),  # the first rank may write for long; one that fails is noticed elsewhere
            )

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with _listening():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        value = [make() if self.leads else None]
        with _listening():
            dist.broadcast_object_list(value, device=torch.device("cpu"))
        return value[0]  # type: ignore[return-value]

    def joined(self, x_SN: Tensor) -> Tensor:
        # A rank without rows need not know their type.
        sizes = self.gather((len(x_SN), x_SN.dtype))
        dtype = next((dtype for rows, dtype in sizes if rows), x_SN.dtype)
        most = max(rows for rows, _ in sizes)
        if most == 0:
            return x_SN
        padded_SN = x_SN.new_zeros(most, *x_SN.shape[1:], dtype=dtype)
        padded_SN[: len(x_SN)] = x_SN
        parts = [torch.empty_like(padded_SN) for _ in sizes]
        with _listening():
            dist.all_gather([_bytes(part) for part in parts], _bytes(padded_SN))
        return torch.cat([part[:rows] for part, (rows, _) in zip(parts, sizes, strict=True)])

    def sum_(self, x: Tensor) -> None:
        for part in x.view(-1).split(VALUES_AT_ONCE):
            total = part.double() if part.is_floating_point() else part.long()
            with _listening():
                dist.all_reduce(total)
            part.copy_(total)

    def min_(self, x: Tensor) -> None:
        with _listening():
            dist.all_reduce(x, dist.ReduceOp.MIN)

    def max_(self, x: Tensor) -> None:
        with _listening():
            dist.all_reduce(x, dist.ReduceOp.MAX)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            with _listening():
                dist.broadcast(_bytes(whole), 0)
            tensor.data.copy_(whole)

    def wait(self) -> None:
        self.gather(None)


def _bytes(x: Tensor) -> Tensor:
    """The memory of x; not every backend knows every type."""
    return x.view(-1).view(torch.uint8)


@contextmanager
def _listening() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        raise RankLost(f"another process of this run does not answer ({first})") from error


def together(devices: Sequence[torch.device], work: Callable[..., T], *args: Any) -> T:
    """Calls `work(ranks, *args)` in a process for each device; what it returns on the first rank.

    Raises what the first rank to fail raised (with the rank's traceback as a note), ChildProcessError where one was
    killed. No process is left then, nor when this one is interrupted or killed.
    """
    context: Any = multiprocessing.get_context(START)
    processes: list[BaseProcess] = []
    readers: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="esparse-") as folder:
        try:
            for rank in range(len(devices)):
                reader, writer = context.Pipe(duplex=False)
                arguments = (rank, devices, os.path.join(folder, "meeting"), writer, pickle.dumps((work, args)))
                processes.append(context.Process(target=_member, args=arguments))
                processes[-1].start()
                writer.close()  # so that the pipe ends where the process does
                readers.append(reader)
            return _outcome(processes, readers)
        finally:
            deadline = time.monotonic() + GRACE
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
                process.kill()
                process.join()


def _outcome(processes: Sequence[BaseProcess], readers: Sequence[Connection]) -> Any:
    results: dict[int, Any] = {}
    failures: list[Exception] = []
    deadline: float | None = None
    while len(results) + len(failures) < len(readers):
        left = [r for rank, r in enumerate(readers) if rank not in results and not r.closed]
        ready = wait(left, None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = readers.index(reader)
            try:
                result, error, trace = pickle.loads(reader.recv_bytes())
            except EOFError:
                error, trace = _died(rank, processes), None
            if error is None:
                results[rank] = result
                continue
            if trace is not None:
                error.add_note(f"in process {rank + 1} of {len(processes)}:\n{trace}")
            failures.append(error)
            reader.close()
            deadline = deadline or time.monotonic() + GRACE
    if failures:
        # A rank that lost another one says nothing about the reason.
        raise next((error for error in failures if not isinstance(error, RankLost)), failures[0])
    return results[0]


def _died(rank: int, processes: Sequence[BaseProcess]) -> ChildProcessError:
    process = processes[rank]
    process.join(GRACE)
    code = process.exitcode
    how = f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += "; if memory ran out, fewer processes (model.devices) or model.store=shards take less"
    return ChildProcessError(f"process {rank + 1} of {len(processes)} {how}")


def _member(
    rank: int,
    devices: Sequence[torch.device],
    meeting: str,
    writer: Connection,
    job: bytes,
) -> None:
    """The whole life of one rank's process.

    What comes in and goes out is pickled here: multiprocessing would pass tensors on as memory of this process.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":  # all ranks are on this machine, whatever its name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    try:
        ranks = DistributedRanks(rank, devices, meeting)
        work, args = pickle.loads(job)
        result = work(ranks, *args)
        ranks.wait()
        writer.send_bytes(pickle.dumps((result if ranks.leads else None, None, None)))
        dist.destroy_process_group()
    except BaseException as error:  # an interruption, too: the process that watches says what is to be said
        writer.send_bytes(pickle.dumps((None, _portable(error), traceback.format_exc())))


def _portable(error: BaseException) -> Exception:
    """The error, or one that says the same where it cannot be passed on to another process."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # its constructor is called with what it passed on, and may raise anything
        copy = None
    return copy if isinstance(copy, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
