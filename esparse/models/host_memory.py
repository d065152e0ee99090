"""Measures the host's free memory, and returns unused memory of the process to the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_host_bytes() -> int:
    """Bytes that the process may still allocate: the least of machine, control group (Slurm, containers), `ulimit -v`.

    If the system does not say what is free (macOS), all its memory counts as free.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    return min([free, *_group_limits(), *_process_limit()])


def free_bytes(device: torch.device) -> int:
    """Bytes that the process may still allocate on a device; on a CPU, the host's."""
    if device.type == "cpu":
        return free_host_bytes()
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def trim() -> None:
    """Makes glibc return freed memory to the system; does nothing with other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_large_tensors_apart() -> None:
    """Makes glibc map every tensor of a megabyte or more separately, and unmap it when it is freed.

    By default glibc soon puts tensors of up to 32 MB on the heap among small allocations, which leaves holes as large
    as the freed blocks: the process would grow by about one block per block.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def _process_limit() -> list[int]:
    """The address space that `ulimit -v` leaves the process; an empty list if it is not limited."""
    most, own = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if most == resource.RLIM_INFINITY or not own.exists():
        return []
    return [max(0, most - int(own.read_text().split()[0]) * resource.getpagesize())]


def _group_limits() -> list[int]:
    """The free bytes of each control group (cgroup v2) around the process; an empty list if there is none."""
    membership, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    if not membership.exists():
        return []
    own = [line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")]
    left = []
    for folder in (p for name in own for p in [root / name.lstrip("/"), *(root / name.lstrip("/")).parents]):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
            left.append(max(0, int(most) - int(used.read_text())))
    return left
