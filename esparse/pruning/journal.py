"""The journal of a run: files on disk, block after block, from which a stopped run continues.

Files in RUN/blocks, each complete or absent: journal.json (identifies the run), pruned-00003.safetensors (the weights
of a pruned block, written by the model's store), done-00003.safetensors (its keep masks and orders, and as metadata its
reports; its presence means that the block is finished), hidden.safetensors (the hidden states in front of some block)
and dense.safetensors (measurements of the dense model). All are deleted after result.json is written.

The hidden states are by far the largest part of a run's state, and running the finished blocks again recomputes them,
so they are written only from time to time.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from esparse.errors import Mistake
from esparse.models.checkpoint import shapes
from esparse.patterns.order import check_order
from esparse.records.audit import Masks
from esparse.records.report import Stages, read_json, write_json, write_whole

log = logging.getLogger("esparse")


@dataclass(slots=True)
class Entry:
    """The results of pruning one block, without its weights; `facts` fit into JSON, `channels` come with a profile.

    `grids`: of quantised weights (pruning/rounding.py).
    """

    keeps: Masks
    orders: dict[str, Tensor]
    facts: dict[str, Any]
    channels: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Dense:
    """Measurements of a dense model (losses by corpus, scores by task), and the id of the run that made them."""

    run: str
    losses: dict[str, Tensor]
    zeroshot: dict[str, dict[str, Any]]


@dataclass(slots=True)
class Journal:
    """A folder with the state of one run.

    As a context manager it is deleted when the run ends with success or with a Mistake, which another attempt would
    end with as well; after any other exception it stays for the next attempt.
    """

    folder: Path
    snapshot_seconds: float | None  # time between two snapshots of the hidden states; None: no snapshots
    finished: int = 0  # number of finished blocks
    resumed: list[int] = field(default_factory=list)  # the blocks at which later attempts started
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, of earlier attempts
    writes: bool = True  # False on all ranks but the first
    _written: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, run: Mapping[str, Any], *, snapshot_seconds: float | None) -> Journal:
        """Opens the journal in this folder; starts a new one if there is none or if it belongs to another run.

        `run`: everything that the state depends on, in JSON types.
        """
        journal = cls(folder, snapshot_seconds)
        stored = read_json(folder / "journal.json")
        if stored.get("run") == run:
            journal.resumed = stored.get("resumed", [])
            while journal._done(journal.finished).exists() and journal.weights(journal.finished).exists():
                if fault := journal._fault(journal.finished):
                    log.warning("%s: block %d is pruned anew, and all behind it", fault, journal.finished + 1)
                    break
                journal.finished += 1
        elif stored:
            log.info("%s belongs to another version, model or text: the run begins anew", folder)
        if journal.finished:
            journal.resumed.append(journal.finished)
            journal.seconds = journal.read(journal.finished - 1).facts["seconds"]
            log.info("an earlier attempt finished %d blocks: the run continues after them", journal.finished)
        elif not journal._dense.exists() or stored.get("run") != run:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "journal.json", {"run": run, "resumed": journal.resumed})
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.writes and (kind is None or issubclass(kind, Mistake)):
            shutil.rmtree(self.folder, ignore_errors=True)

    def with_earlier(self, stages: Stages) -> dict[str, float]:
        """Seconds by stage, including earlier attempts."""
        return {s: self.seconds.get(s, 0.0) + stages.seconds.get(s, 0.0) for s in self.seconds | stages.seconds}

    def weights(self, index: int) -> Path:
        """The file for the weights of a pruned block."""
        return self.folder / f"pruned-{index:05}.safetensors"

    def write(self, index: int, entry: Entry, stages: Stages) -> None:
        """Writes the entry of a finished block, whose weights are on disk already."""
        if not self.writes:
            return
        facts = {"facts": entry.facts | {"seconds": self.with_earlier(stages)}, "shapes": entry.keeps.shapes}
        facts["weights"] = _content(self.weights(index))
        tensors = {f"keep/{name}": packed for name, packed in entry.keeps.packed.items()}
        tensors |= {f"order/{name}": order.clone() for name, order in entry.orders.items()}  # some are one tensor
        tensors |= {f"channel/{name}": value_I for name, value_I in entry.channels.items()}
        tensors |= {f"grid/{name}": value.contiguous() for name, value in entry.grids.items()}
        metadata = {"json": json.dumps(facts)}
        write_whole(self._done(index), lambda draft: save_file(tensors, draft, metadata=metadata))

    def _fault(self, index: int) -> str | None:
        """What is wrong with the files of a block, by their headers: none of them is read whole; None if they fit."""
        for file in (done := self._done(index), self.weights(index)):
            if fault := _damage(file):
                return fault
        with safe_open(done, framework="pt") as read:
            written = json.loads((read.metadata() or {}).get("json", "{}"))
        if not {"facts", "shapes", "weights"} <= written.keys():
            return f"{done} is not what a run writes"
        if written["weights"] != _content(self.weights(index)):
            return f"{self.weights(index)} holds other tensors than the run wrote"
        return None

    def read(self, index: int) -> Entry:
        """The entry of a block, with the seconds by stage until then in its facts."""
        with safe_open(self._done(index), framework="pt") as file:
            written = json.loads(file.metadata()["json"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        keeps = Masks()
        keeps.packed = {name.removeprefix("keep/"): t for name, t in tensors.items() if name.startswith("keep/")}
        keeps.shapes = written["shapes"]
        orders = {name.removeprefix("order/"): t for name, t in tensors.items() if name.startswith("order/")}
        for name, order in orders.items():
            try:
                for order_I in order.flatten(0, -2) if order.ndim > 1 else [order]:
                    check_order(order_I, order.shape[-1])
            except ValueError as error:
                raise Mistake(f"{self._done(index)}, {name}: {error}; rerun=true begins anew") from error
        channels = {name.removeprefix("channel/"): t for name, t in tensors.items() if name.startswith("channel/")}
        grids = {name.removeprefix("grid/"): t for name, t in tensors.items() if name.startswith("grid/")}
        return Entry(keeps, orders, written["facts"], channels, grids)

    def snapshot_due(self) -> bool:
        return self.snapshot_seconds is not None and time.monotonic() - self._written >= self.snapshot_seconds

    def snapshot(self, index: int, streams: Mapping[str, list[Tensor]]) -> None:
        """Writes the hidden states that enter this block, by stream, if a snapshot is due."""
        if not self.snapshot_due():
            return
        tensors = {f"{name}/{i:06}": t.cpu() for name, hidden in streams.items() for i, t in enumerate(hidden)}
        metadata = {"index": str(index)}
        write_whole(self._hidden, lambda draft: save_file(tensors, draft, metadata=metadata))
        self._written = time.monotonic()

    def snapshot_before(self) -> int:
        """The block whose hidden states are on disk; 0 if there are none, or if they enter a block too far ahead.

        The latter happens if a crash, or a user, removed files of finished blocks.
        """
        if not self._hidden.exists():
            return 0
        if fault := _damage(self._hidden, "index"):
            log.warning("%s: the hidden states are computed anew", fault)
            return 0
        with safe_open(self._hidden, framework="pt") as file:
            index = int(file.metadata()["index"])
        if index > self.finished:
            log.info("the hidden states on disk enter block %d, but only %d blocks are finished", index, self.finished)
            return 0
        return index

    def hidden(self, stream: str) -> list[Tensor]:
        """The saved hidden states of one stream."""
        with safe_open(self._hidden, framework="pt") as file:
            return [file.get_tensor(n) for n in sorted(file.keys()) if n.startswith(f"{stream}/")]

    def write_dense(self, dense: Dense) -> None:
        """Writes the measurements of the dense model."""
        if self.writes:
            facts = {"json": json.dumps({"run": dense.run, "zeroshot": dense.zeroshot})}
            write_whole(self._dense, lambda draft: save_file(dense.losses, draft, metadata=facts))

    def dense(self) -> Dense | None:
        """The measurements of the dense model; None if they were not written, or can be read no more."""
        if not self._dense.exists():
            return None
        if fault := _damage(self._dense, "json"):
            log.warning("%s: the dense model is measured anew", fault)
            return None
        with safe_open(self._dense, framework="pt") as file:
            facts = json.loads(file.metadata()["json"])
            losses = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Dense(facts["run"], losses, facts["zeroshot"])

    @property
    def _hidden(self) -> Path:
        return self.folder / "hidden.safetensors"

    @property
    def _dense(self) -> Path:
        return self.folder / "dense.safetensors"

    def _done(self, index: int) -> Path:
        return self.folder / f"done-{index:05}.safetensors"


def _content(file: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a file, in JSON types."""
    return {name: list(shape) for name, shape in shapes(file).items()}


def _damage(file: Path, key: str | None = None) -> str | None:
    """What is wrong with a file that was cut short, or that no run wrote; `key`: of its metadata. None: nothing."""
    try:
        with safe_open(file, framework="pt") as read:
            if key is None or key in (read.metadata() or {}):
                return None
            return f"{file} is not what a run writes"
    except SafetensorError as error:
        return f"{file} is damaged ({str(error).removeprefix('Error while deserializing header: ')})"
    except OSError as error:  # safetensors' own does not name the file
        raise OSError(f"cannot read {file}: {error}") from error
