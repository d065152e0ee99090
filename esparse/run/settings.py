"""The settings of one run, as one object. Nothing here loads torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse import patterns
from esparse.allocations import Allocation
from esparse.bench import Bench
from esparse.data.calibration import Calibration
from esparse.data.windows import Perplexity
from esparse.errors import Mistake
from esparse.evaluate.zeroshot import ZeroShot
from esparse.export import Export, NoExport
from esparse.metrics import Metric
from esparse.models.load import Model
from esparse.parts.numbers import alike
from esparse.patterns import Pattern
from esparse.prepare import Prepare
from esparse.pruning.method import Method
from esparse.quantise import Quantise
from esparse.recoveries import Recovery
from esparse.run.duration import gpus
from esparse.run.tracking import Tracking
from esparse.shuffles import Shuffle
from esparse.updates import Update

if TYPE_CHECKING:
    import torch

log = logging.getLogger("esparse")


def expanded(path: str) -> str:
    """output_root with the home directory in place of ~. Raises Mistake for an unknown user, and if it is empty."""
    if not path.strip():  # as a variable of the shell that is not set; a sweep would go to /sweeps
        raise Mistake(f"output_root must name a folder, got {path!r}")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise Mistake(f"{path} names the home of a user that this machine does not know") from None


@dataclass(kw_only=True, slots=True)
class Experiment:
    """The settings of one run; every field is a group or a value of the command line."""

    model: Model
    calibration: Calibration
    prepare: Prepare
    metric: Metric
    allocation: Allocation
    shuffle: Shuffle
    update: Update
    recovery: Recovery
    quantise: Quantise
    evaluate: Perplexity
    zeroshot: ZeroShot
    bench: Bench
    export: Export
    tracking: Tracking
    # `P%@columns`, `P%@rows`: P per cent of a matrix's inputs or outputs are removed whole, those with the lowest mean
    # score. `P%@16x16`: of the blocks of 16 outputs by 16 inputs that stand side by side, P per cent are removed whole,
    # likewise (a block at the edge may be smaller). Rounded down to whole weights, columns, rows or blocks. In YAML
    # write it in quotes: unquoted, 2:4 is the number 124. `dense`: nothing is removed
    pattern: str  # `n:m`: n of every m consecutive weights of a row survive. `P%`: P per cent of each row are removed
    # 256 is a multiple of m
    outliers: str | None  # `k:256`: of every 256 weights of a row the k best survive that an n:m pattern would remove
    seed: int  # of the calibration sample and of random scores
    output_root: str  # folder of all records
    # Also keeps each channel's entropy, norm and mean score
    profile: bool  # counts zeros and near zeros in weights, activations and attention, dense and pruned
    rerun: bool  # repeat a finished run
    # Without snapshots, a continued run first runs all finished blocks once more
    snapshot_seconds: float | None  # between snapshots, from which a stopped run continues; None: none
    # From the model's configuration alone, for the named models also without internet: bytes, peak memory by stage,
    # passes, FLOP, and seconds from this machine's rates, which are measured in one second. With the name of a GPU
    # (`a100`, `a100-40gb`, `h100`, `h100-pcie`, `h200`, `l40s`, `l4`, `a10`, `v100`, `rtx4090`, `mi300x`) the plan is
    # for that GPU, here or not, at its published rates
    dry_run: Any  # `true`, or the name of a GPU: only print what the run would need

    def __post_init__(self) -> None:
        self.output_root = expanded(self.output_root)
        pattern, method = self.parsed_pattern(), self.method()
        method.check()
        self.bench.check(pattern)
        self.export.check(pattern, self.recovery, self.shuffle, self.quantise)
        if self.model.store == "shards" and (why := method.needs_whole_model()) is not None:
            raise Mistake(f"{why}, and model.store=shards reads it block by block: use model.store=memory")
        if self.model.processes > 1 and (why := method.needs_all_sequences()) is not None:
            raise Mistake(f"{why}, and model.devices={self.model.devices} deals them out: use model.devices=cpu")
        if self.tracking.needs_export() and isinstance(self.export, NoExport):
            raise Mistake(
                "tracking.artifacts=[checkpoint] uploads what export writes, and export=none writes nothing: use "
                "export=dense or export=packed"
            )
        if self.snapshot_seconds is not None and not self.snapshot_seconds >= 0:
            raise Mistake(f"snapshot_seconds must not be negative, got {self.snapshot_seconds:g}")

        if not isinstance(self.dry_run, bool) and self.dry_run not in (known := gpus()):
            meant = alike(str(self.dry_run), known)
            hint = f": did you mean {' or '.join(meant)}?" if meant else ""
            raise Mistake(f"dry_run must be true, false or a GPU ({', '.join(known)}), got {self.dry_run!r}{hint}")

    def devices(self) -> list[torch.device]:
        """The devices that share the calibration sequences. Raises Mistake for a device that does not exist."""
        devices = self.model.all_devices()
        if len(devices) > 1 and (why := self.method().needs_all_sequences()) is not None:
            log.info("%s: of %d devices only %s is used", why, len(devices), devices[0])
            return devices[:1]
        return devices

    def parsed_pattern(self) -> Pattern:
        return patterns.parse(self.pattern, self.outliers)

    def method(self) -> Method:
        """The pruning method: everything that decides which weights are kept, and their values."""
        return Method(
            metric=self.metric,
            pattern=self.parsed_pattern(),
            shuffle=self.shuffle,
            update=self.update,
            recovery=self.recovery,
            quantise=self.quantise,
            prepare=self.prepare,
            allocation=self.allocation,
            seed=self.seed,
        )
