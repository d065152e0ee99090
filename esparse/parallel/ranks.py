"""Ranks: processes that carry out one run together, each on its own device with its share of the sequences.

Every rank runs the same program. A `Ranks` object combines the ranks' statistics, and from there on all ranks compute
the same. Only the first rank writes files. The parent process only watches: it uses no GPU and runs no collectives, so
that it can end the ranks in any state.

Shapes: S sequences or windows that are shared, N all other dimensions.
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

VALUES_AT_ONCE = 2**24  # values of a float32 tensor that are summed in float64 at a time
START = "spawn"  # a forked child cannot use GPUs if its parent has initialised CUDA
GRACE = 5.0  # seconds for the other ranks to end by themselves after one has failed


class Ranks:
    """The only process of a run; every collective operation returns its argument."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def before(self, count: int) -> int:
        """The number of items that the ranks before this one get if `count` consecutive items are shared."""
        return self.rank * (count // self.size) + min(self.rank, count % self.size)

    def share(self, x_SN: Tensor) -> Tensor:
        """This rank's rows; the ranks' numbers of rows differ by at most one, and may be 0."""
        return x_SN.tensor_split(self.size)[self.rank]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of `make` on the first rank, which alone calls it."""
        return make()

    def joined(self, x_SN: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks."""
        return x_SN

    def sum_(self, x: Tensor) -> None:
        """Replaces x by its sum over the ranks, taken in float64 or in integers."""

    def min_(self, x: Tensor) -> None:
        """Replaces x by its minimum over the ranks, entry by entry."""

    def max_(self, x: Tensor) -> None:
        """Replaces x by its maximum over the ranks, entry by entry."""

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replaces the tensors' values by the first rank's, bit by bit."""

    def wait(self) -> None:
        """Waits until every rank has called it."""


class RankLost(RuntimeError):
    """Raised if another rank does not answer; that rank's own error gives the reason."""


class DistributedRanks(Ranks):
    """One of several ranks, by torch.distributed: gloo for CPU tensors and NCCL for GPU tensors."""

    def __init__(self, rank: int, devices: Sequence[torch.device], meeting: str) -> None:
        """`meeting`: path of a file that does not exist yet, by which the ranks find each other."""
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
                timeout=timedelta(days=1),  # the first rank may write for long; failures are noticed elsewhere
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
        # A rank without rows may not know their dtype.
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
    """The memory of x as bytes, because backends do not support all dtypes."""
    return x.view(-1).view(torch.uint8)


@contextmanager
def _listening() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        raise RankLost(f"another process of this run does not answer ({first})") from error


def together(devices: Sequence[torch.device], work: Callable[..., T], *args: Any) -> T:
    """Calls `work(ranks, *args)` in one process per device; returns the first rank's result.

    Raises the exception of the first rank that failed (with its traceback as a note), or ChildProcessError if a rank
    was killed. All processes are ended then, and also if this process is interrupted or killed.
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
                writer.close()  # so that the pipe closes when the process ends
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
        # The error of a rank that lost another one does not give the reason.
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
    """The main function of one rank's process.

    Arguments and results are pickled here, because multiprocessing would pass tensors as shared memory of this process.
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
    except BaseException as error:  # also an interruption: the parent process reports it
        writer.send_bytes(pickle.dumps((None, _portable(error), traceback.format_exc())))


def _portable(error: BaseException) -> Exception:
    """The error, or one with the same message if the error cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # unpickling calls the error's constructor, which may raise anything
        copy = None
    return copy if isinstance(copy, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
