"""How much memory the host still has, and giving back what the process no longer uses."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path


def free_host_bytes() -> int:
    """What the process may still take: of the machine, or of its control group (Slurm, containers) where that is less.

    Where the system does not say what is free (macOS), all memory counts.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    return min([free, *_group_limits()])


def trim() -> None:
    """Makes the C library give freed memory back to the system, where it is glibc.

    Between small tensors that stay it would keep holes as large as the blocks that went: about a block per block.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


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
