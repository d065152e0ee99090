"""How much memory the host still has, and giving back what the process no longer uses."""

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
    """What the process may still take: of the machine, of its control group (Slurm, containers), of `ulimit -v`.

    Where the system does not say what is free (macOS), all memory counts.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    return min([free, *_group_limits(), *_process_limit()])


def free_bytes(device: torch.device) -> int:
    """What the process may still take of a device's memory, or of the host's where the device is the CPU."""
    if device.type == "cpu":
        return free_host_bytes()
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def trim() -> None:
    """Makes the C library give freed memory back to the system, where it is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_large_tensors_apart() -> None:
    """From now on every tensor of a megabyte or more has a mapping of its own, which goes with it; where it is glibc.

    That library would soon put tensors of up to 32 MB among the small things that stay, and keep holes as large as the
    blocks that went: the process would grow by about a block per block.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def _process_limit() -> list[int]:
    """What `ulimit -v` has left of the process' addresses; nothing where it is not limited."""
    most, own = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if most == resource.RLIM_INFINITY or not own.exists():
        return []
    return [max(0, most - int(own.read_text().split()[0]) * resource.getpagesize())]


def _group_limits() -> list[int]:
    """What each control group above the process has left (cgroup v2); none where there is none."""
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
