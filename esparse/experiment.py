"""One experiment from its settings to its record: the table of contents of the program."""

from __future__ import annotations

import contextlib
import logging
import platform
import resource
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse import __version__, patterns
from esparse.allocations import Allocation
from esparse.bench import Bench
from esparse.data.calibration import Calibration
from esparse.data.windows import Perplexity
from esparse.evaluate.zeroshot import Scores, ZeroShot
from esparse.export import Export
from esparse.metrics import Metric
from esparse.models.load import Model, weight_files
from esparse.patterns import Pattern
from esparse.prepare import NoPreparation, Prepare
from esparse.recoveries import Recovery
from esparse.report import LayerReport, Stages, as_dicts, write_json
from esparse.shuffles import NoShuffle, Shuffle
from esparse.tracking import NoTracking, Tracking
from esparse.updates import Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from esparse.bench import Measured
    from esparse.journal import Dense, Journal
    from esparse.method import Method
    from esparse.models.blocks import BlockModel
    from esparse.prune import Pruned
    from esparse.ranks import Ranks

log = logging.getLogger("esparse")


@dataclass(kw_only=True, slots=True)
class Experiment:
    """What one run is asked for; every field is a group or a value of the command line."""

    model: Model
    calibration: Calibration
    prepare: Prepare
    metric: Metric
    allocation: Allocation
    shuffle: Shuffle
    update: Update
    recovery: Recovery
    evaluate: Perplexity
    zeroshot: ZeroShot
    bench: Bench
    export: Export
    tracking: Tracking
    pattern: str  # n:m (n of m survive), P% (P per cent of each row are removed), P%@columns, ...
    outliers: str | None  # k:256: in every run of 256 k weights survive beside the pattern
    seed: int  # of the calibration sample and of random scores
    output_root: str  # folder of all records
    profile: bool  # report zeros and near zeros in weights, activations and attention, and keep the channels' values
    rerun: bool  # repeat a finished run
    snapshot_seconds: float | None  # between two writings of hidden states, for a resumed run; None: never
    dry_run: bool  # only say what the run would take

    def __post_init__(self) -> None:
        pattern = self.parsed_pattern()
        for component in (self.allocation, self.shuffle, self.update, self.recovery, self.bench):
            component.check(pattern)
        self.export.check(pattern, self.recovery, shuffled=not isinstance(self.shuffle, NoShuffle))
        if self.metric.gradients() == "model" and not isinstance(self.prepare, NoPreparation):
            raise ValueError(
                "the gradients of the whole model are taken before any block is prepared and would not fit the "
                "prepared weights: use metric.source=block or prepare=none"
            )
        if self.model.store == "shards" and (why := self.method().needs_whole_model()) is not None:
            raise ValueError(f"{why}, and model.store=shards reads it block by block: use model.store=memory")
        if self.model.processes > 1 and (why := self.method().needs_all_sequences()) is not None:
            raise ValueError(f"{why}, and model.devices={self.model.devices} deals them out: use model.devices=cpu")
        if self.snapshot_seconds is not None and not self.snapshot_seconds >= 0:
            raise ValueError(f"snapshot_seconds must not be negative, got {self.snapshot_seconds:g}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be between 0 and 2147483647, got {self.seed}")

    def devices(self) -> list[torch.device]:
        """Those that the sequences are dealt out to; ValueError where one is asked for that is not there."""
        devices = self.model.all_devices()
        if len(devices) > 1 and (why := self.method().needs_all_sequences()) is not None:
            log.info("%s: of %d devices only %s is used", why, len(devices), devices[0])
            return devices[:1]
        return devices

    def parsed_pattern(self) -> Pattern:
        return patterns.parse(self.pattern, self.outliers)

    def method(self) -> Method:
        """What decides which weights survive and what becomes of them."""
        from esparse.method import Method

        return Method(
            metric=self.metric,
            pattern=self.parsed_pattern(),
            shuffle=self.shuffle,
            update=self.update,
            recovery=self.recovery,
            prepare=self.prepare,
            allocation=self.allocation,
            seed=self.seed,
        )


def dry_run(experiment: Experiment, *, name: str) -> str:
    """What the run would take, in words; nothing is loaded but the model's configuration."""
    from esparse.plan import plan

    calibration = experiment.calibration
    return plan(
        experiment.model,
        experiment.method(),
        title=name,
        sequences=calibration.sequences,
        length=calibration.length,
        window=experiment.evaluate.length,
        ranks=len(experiment.devices()),
    ).text()


def run(
    experiment: Experiment,
    *,
    run_id: str,
    name: str,
    config: dict[str, Any],
    folder: Path,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Prunes one model, measures it before and after, and leaves the record in `folder`; returns the record.

    Where there are several ranks, each calls it; the first one writes the files.
    """
    from esparse import audit
    from esparse.evaluate import zeros
    from esparse.evaluate.perplexity import perplexity, window_losses
    from esparse.export import Finished
    from esparse.journal import Journal
    from esparse.models.blocks import BlockModel
    from esparse.models.keeper import Keeper
    from esparse.models.load import load, longest_sequence
    from esparse.progress import Progress
    from esparse.prune import check_store, prune
    from esparse.ranks import Ranks

    ranks = ranks or Ranks()
    started, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.perf_counter()
    method = experiment.method()
    device = experiment.model.all_devices()[ranks.rank]
    experiment.bench.require(device)
    software = environment(device, ranks.size)
    stages = Stages(settle=_settle(device))
    with stages("load"):
        model, tokenizer, store = load(experiment.model, folder / "blocks", ranks)
        keeper = Keeper(experiment.model.activations, folder)
        blocks = BlockModel(
            model,
            device=device,
            batch_tokens=experiment.model.tokens_at_once(device),
            store=store,
            keeper=keeper,
            ranks=ranks,
        )
        check_store(blocks, method)
        experiment.export.ready(blocks, experiment.recovery, folder)
        experiment.bench.ready(model)
        longest = longest_sequence(model)
        texts = experiment.evaluate
        # Read by one rank, so that all have the same.
        tokens_SL = ranks.from_first(lambda: experiment.calibration.sample(tokenizer, longest))
        windows = ranks.from_first(lambda: {texts.name(c): texts.windows(c, tokenizer, longest) for c in texts.corpora})
        tasks = experiment.zeroshot.load()
        journal = ranks.from_first(
            lambda: Journal.open(
                folder / "blocks",
                _state_depends_on(experiment, run_id, model, tokens_SL, windows, software),
                snapshot_seconds=experiment.snapshot_seconds,
            )
        )
        journal.writes = ranks.leads
    tracking = experiment.tracking if ranks.leads else NoTracking()
    with (
        journal,
        tracking.run(run_id=run_id, name=name, config=config, folder=folder) as sink,
        Progress(len(blocks.blocks), shown=ranks.leads) as progress,
    ):

        def on_layer(block: int, layer: LayerReport) -> None:
            progress.layer(block, layer)
            sink.log({"block": block, "kept_score": layer.kept_score, "relative_error": layer.relative_error})

        parameters = sum(p.numel() for p in model.parameters())
        dense_bytes = sum(p.nbytes for p in model.parameters())

        def measure(which: str) -> tuple[dict[str, Tensor], Scores]:
            """Perplexities and accuracies of the model as it is; every rank calls it."""
            with stages("evaluate"):
                losses = {
                    c: window_losses(blocks, w, progress.evaluating(f"{which} on {c}")) for c, w in windows.items()
                }
            with stages("zeroshot"):
                on_block = progress.evaluating(f"{which} on tasks")
                return losses, experiment.zeroshot.measure(tasks, blocks, tokenizer, longest, on_block)

        def profiled() -> zeros.Shares:
            with stages("profile"):
                return ranks.from_first(lambda: zeros.shares(blocks, tokens_SL)) if experiment.profile else {}

        dense_shares = profiled()
        dense = _dense(experiment, run_id, blocks, windows, journal, measure)
        progress.pruning()
        pruned = prune(
            blocks,
            tokens_SL,
            method,
            skip=experiment.model.skip,
            stages=stages,
            on_layer=on_layer,
            journal=journal,
            profile=experiment.profile,
        )
        progress.block_done()
        losses, scores = measure("pruned")
        shares = profiled()
        peaks = ranks.gather(peak_mib(device))
        if not ranks.leads:
            return {}
        with stages("bench"):
            timed = _timed(experiment, blocks, pruned)
        by_window = {"dense": dense.losses, "pruned": losses}
        mask_bytes = audit.write(folder, pruned.keeps, pruned.orders, tokens_SL, by_window, pruned.channels)
        record = {
            "id": run_id,
            "name": name,
            "status": "finished",
            "started": started,
            "seconds": round(time.perf_counter() - clock + sum(journal.seconds.values()), 3),
            "resumed": journal.resumed,
            "config": config,
            "environment": software,
            "model": {
                "name": experiment.model.title,
                "family": model.config.model_type,
                "parameters": parameters,
                "pruned_parameters": pruned.weights,
            },
            "sparsity": {
                "pattern": str(method.pattern),
                "density": pruned.survivors / pruned.weights,
                "pattern_holds": pruned.pattern_holds,
            },
            "quality": {
                corpus: {
                    "dense": perplexity(dense.losses[corpus]),
                    "pruned": perplexity(losses[corpus]),
                    "tokens": windows_WL.numel(),
                    "sequence_length": windows_WL.shape[1],
                    "dense_run": dense.run,
                }
                for corpus, windows_WL in windows.items()
            },
            **({"zeroshot": experiment.zeroshot.report(dense.zeroshot, scores, dense.run)} if scores else {}),
            **({"profile": zeros.report(dense_shares, shares, tokens_SL)} if shares else {}),
            "layers": as_dicts(pruned.layers),
            "recovery": as_dicts(pruned.recoveries),
            "seconds_by_stage": _rounded(journal.with_earlier(stages)),
            "memory": memory(dense_bytes, model.dtype.itemsize, pruned, mask_bytes, peaks),
        }
        if timed.rows:
            record |= {"latency": timed.rows, "limits": timed.limits}
        with stages("export"):
            exported = experiment.export.write(Finished(blocks, tokenizer, pruned, tokens_SL, record, folder))
        if exported is not None:
            record["export"] = exported
            record["seconds"] = round(time.perf_counter() - clock + sum(journal.seconds.values()), 3)
            record["seconds_by_stage"] = _rounded(journal.with_earlier(stages))
        sink.finish(record)
        write_json(folder / "result.json", record)
    return record


def _timed(experiment: Experiment, blocks: BlockModel, pruned: Pruned) -> Measured:
    """Dense against sparse, as `bench` asks; nothing where it asks for nothing."""
    from esparse.bench import LayerShape, Measured, Subject, in_words
    from esparse.patterns import NM

    nm = experiment.parsed_pattern()
    if not isinstance(nm, NM):  # only bench=none takes any other
        return Measured()
    layers = [LayerShape(layer.name, *layer.shape) for layer in pruned.layers]
    timed = experiment.bench.run(Subject(blocks.model, layers, pruned.keeps, pruned.orders, nm, blocks.device))
    for row in timed.rows:
        log.info("%s", in_words(row))
    return timed


# Of the last dense model measured in this process: what was asked, and what came out. The runs of a sweep that prune
# the same model then measure it once; the record says which run did.
dense_known: dict[str, Dense] = {}


def _dense(
    experiment: Experiment,
    run_id: str,
    blocks: BlockModel,
    windows: dict[str, Tensor],
    journal: Journal,
    measure: Callable[[str], tuple[dict[str, Tensor], Scores]],
) -> Dense:
    """What was measured on the dense model, now or earlier."""
    from esparse.journal import Dense

    if (known := blocks.ranks.from_first(journal.dense)) is not None:
        return known
    asked = f"{experiment.model} {_hashes(windows)} {experiment.zeroshot} {experiment.zeroshot.stamps()}"
    if experiment.rerun or asked not in dense_known:
        measured = Dense(run_id, *measure("dense"))
        dense_known.clear()
        dense_known[asked] = measured
    journal.write_dense(dense_known[asked])
    return dense_known[asked]


def _hashes(tokens: dict[str, Tensor]) -> dict[str, str]:
    # The shapes belong to it: the same tokens in windows of another length are another measurement.
    return {name: f"{list(t.shape)} {sha256(t.numpy().tobytes()).hexdigest()}" for name, t in tokens.items()}


def _state_depends_on(
    experiment: Experiment,
    run_id: str,
    model: PreTrainedModel,
    tokens_SL: Tensor,
    windows: dict[str, Tensor],
    software: dict[str, Any],
) -> dict[str, Any]:
    """What has to be the same for a later attempt to go on where an earlier one stopped, as JSON has it."""
    return {
        "id": run_id,
        "software": {name: software[name] for name in ("torch", "transformers", "lm_eval", "esparse", "commit")},
        "tokens": _hashes(windows | {"calibration": tokens_SL}),
        "tasks": experiment.zeroshot.stamps(),
        "weights": [getattr(model.config, "_commit_hash", None), *weight_files(experiment.model)],
    }


def environment(device: torch.device, devices: int = 1) -> dict[str, Any]:
    """Versions, device, host, and the commit of the checkout that esparse runs from (with + where it was edited)."""
    import torch

    checkout = Path(__file__).parent.parent
    commit = None
    if (checkout / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            described = subprocess.run(
                ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
                cwd=checkout,
                capture_output=True,
                text=True,
                timeout=10,
            )
            commit = described.stdout.strip() or None
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "lm_eval": version("lm_eval"),
        "esparse": __version__,
        "device": kind if devices == 1 else f"{devices} x {kind}",
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "commit": commit,
    }


def peak_mib(device: torch.device) -> tuple[float, float | None]:
    """The most that this process ever took of the host and of the device."""
    import torch

    unit = 1 if platform.system() == "Darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return round(host / 2**20, 1), None if on_device is None else round(on_device / 2**20, 1)


def memory(
    dense_bytes: int, element_bytes: int, pruned: Pruned, mask_bytes: int, peaks: list[tuple[float, float | None]]
) -> dict[str, Any]:
    """Peaks in MiB, and the bytes of the model's tensors dense and bit-mask packed.

    `peaks` of each process: those of the host are added, of the devices the fullest one counts.
    Packed: the surviving values in the model's precision, the bit masks of pruned matrices, and all that is not pruned.
    packed_bytes, file_bytes: with all layers that `export=packed` packs as they are in memory and on disk then.
    metadata_bits: what the pattern needs at least to say which weights survive, per pruned weight (0.75 at 2:4);
    bits_per_weight: that and the surviving values.
    """
    sparse = dense_bytes - (pruned.weights - pruned.survivors) * element_bytes + mask_bytes
    metadata_bits = pruned.metadata_bits / pruned.weights
    packable = [layer for layer in pruned.layers if layer.packed_bytes is not None]
    rest = dense_bytes - sum(layer.dense_bytes for layer in packable)
    return {
        "peak_host_mib": round(sum(host for host, _ in peaks), 1),
        "peak_device_mib": max((on_device for _, on_device in peaks if on_device is not None), default=None),
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse,
        "saving": 1 - sparse / dense_bytes,
        "packed_bytes": rest + sum(layer.packed_bytes or 0 for layer in packable),
        "file_bytes": rest + sum(layer.file_bytes or 0 for layer in packable),
        "metadata_bits": metadata_bits,
        "bits_per_weight": 8 * element_bytes * pruned.survivors / pruned.weights + metadata_bits,
    }


def _rounded(seconds_by_stage: dict[str, float]) -> dict[str, float]:
    return {stage: round(seconds, 3) for stage, seconds in seconds_by_stage.items()}


def _settle(device: torch.device) -> Callable[[], None]:
    import torch

    if device.type != "cuda":
        return lambda: None
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.synchronize(device)
