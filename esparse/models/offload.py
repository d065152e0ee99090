"""Stores hidden states between two blocks: on the host, on the device, or on disk."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from esparse.models import host_memory

APART = 2**17  # bytes; glibc takes smaller tensors from its heap anyway


@dataclass(frozen=True, slots=True)
class HiddenStateStore:
    """Stores hidden states on the host, on the device, or in files of a folder."""

    place: str  # auto | host | device | disk
    folder: Path | None = None  # for `disk`; None: the system's temporary folder

    def choose(self, size: int) -> Callable[[Tensor], Tensor]:
        """The function that stores a tensor; `size`: bytes of one stream of hidden states.

        auto means the host, or the disk if a stream takes more than a quarter of the host's free memory: a run may
        have two streams, and while a block runs the old and the new states of one of them.
        """
        place = self.place
        if place == "auto":
            place = "disk" if size > host_memory.free_host_bytes() / 4 else "host"
        if place == "disk":
            return self._on_disk
        return _on_host if place == "host" else lambda hidden: hidden

    def _on_disk(self, hidden: Tensor) -> Tensor:
        """A copy whose memory is an unnamed file, so that its disk space is freed with the tensor."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="activations-") as file:
            file.truncate(hidden.nbytes)  # does not notice a full disk; the next step does
            try:
                # Reserves the space: writing to a mapped page without space on the disk would kill the process.
                _reserve(file.fileno(), hidden.nbytes)
            except OSError as error:
                raise OSError(f"no room for activations of {hidden.nbytes:,} bytes in {file.name}: {error}") from error
            kept = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
        return kept.view(hidden.shape).copy_(hidden)


def _on_host(hidden: Tensor) -> Tensor:
    """A copy whose memory belongs to no heap, if it is large.

    On the heap, states that live for a whole block lie between what forward passes free, and keep the holes alive.
    """
    if hidden.nbytes < APART or not hasattr(mmap, "MAP_PRIVATE"):  # Windows has none
        return hidden.cpu()
    try:
        memory = mmap.mmap(-1, hidden.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # the system limits how many there may be
        return hidden.cpu()
    return torch.frombuffer(memory, dtype=hidden.dtype).view(hidden.shape).copy_(hidden)


def _reserve(descriptor: int, size: int) -> None:
    import os

    if hasattr(os, "posix_fallocate") and size:  # macOS has none
        os.posix_fallocate(descriptor, 0, size)
