"""One experiment from its settings to its record: the table of contents of the program."""

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
from esparse.evaluate.zeroshot import ZeroShot
from esparse.export import Export, NoExport
from esparse.metrics import Metric
from esparse.models.load import Model, weight_files
from esparse.patterns import Pattern
from esparse.prepare import NoPreparation, Prepare
from esparse.records.report import LayerReport, write_json
from esparse.recoveries import Recovery
from esparse.run.tracking import NoTracking, Tracking
from esparse.shuffles import NoShuffle, Shuffle
from esparse.updates import Update

if TYPE_CHECKING:
    import torch

    from esparse.bench import Measured
    from esparse.models.blocks import BlockModel
    from esparse.parallel.ranks import Ranks
    from esparse.pruning.method import Method
    from esparse.pruning.prune import Pruned

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
        if self.tracking.needs_export() and isinstance(self.export, NoExport):
            raise ValueError(
                "tracking.artifacts=[checkpoint] uploads what export writes, and export=none writes nothing: use "
                "export=dense or export=packed"
            )
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
        from esparse.pruning.method import Method

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
    from esparse.run.plan import plan

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
    again: bool = False,
) -> dict[str, Any]:
    """Prunes one model, measures it before and after, and leaves the record in `folder`; returns the record.

    Where there are several ranks, each calls it; the first one writes the files. `again`: the next run of this process
    prunes the same model.
    """
    from esparse.export import Finished
    from esparse.models.blocks import BlockModel
    from esparse.models.load import identity, load, longest_sequence
    from esparse.models.offload import Keeper
    from esparse.models.walk_check import check
    from esparse.parallel.ranks import Ranks
    from esparse.pruning.journal import Journal
    from esparse.pruning.prune import check_store, prune
    from esparse.records import audit
    from esparse.run.measure import Measuring, digests
    from esparse.run.progress import Progress
    from esparse.run.record import STATE_DEPENDS_ON, Clock, Size, build, environment, peak_mib

    ranks = ranks or Ranks()
    method = experiment.method()
    device = experiment.model.all_devices()[ranks.rank]
    clock = Clock.start(device)
    stages = clock.stages
    experiment.bench.require(device)
    software = environment(device, ranks.size)
    with stages("load"):
        model, tokenizer, store = load(experiment.model, folder / "blocks", ranks, again=again)
        blocks = BlockModel(
            model,
            device=device,
            batch_tokens=experiment.model.tokens_at_once(device),
            store=store,
            keeper=Keeper(experiment.model.activations, folder),
            ranks=ranks,
        )
        check_store(blocks, method)
        experiment.export.ready(blocks, experiment.recovery, folder)
        experiment.bench.ready(model)
        size = Size.of(model)
        longest = longest_sequence(model)
        texts = experiment.evaluate
        # Read by one rank, so that all have the same.
        tokens_SL = ranks.from_first(lambda: experiment.calibration.sample(tokenizer, longest))
        check(blocks, tokens_SL)
        windows = ranks.from_first(lambda: {texts.name(c): texts.windows(c, tokenizer, longest) for c in texts.corpora})
        tasks = experiment.zeroshot.load()
        state = {  # what has to be the same for a later attempt to go on where an earlier one stopped
            "id": run_id,
            "software": {part: software[part] for part in STATE_DEPENDS_ON},
            "tokens": digests(windows | {"calibration": tokens_SL}),
            "tasks": experiment.zeroshot.stamps(),
            "weights": [getattr(model.config, "_commit_hash", None), *weight_files(experiment.model)],
        }
        journal = ranks.from_first(
            lambda: Journal.open(folder / "blocks", state, snapshot_seconds=experiment.snapshot_seconds)
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

        measuring = Measuring(
            blocks=blocks,
            tokenizer=tokenizer,
            longest=longest,
            windows=windows,
            zeroshot=experiment.zeroshot,
            tasks=tasks,
            profile=experiment.profile,
            stages=stages,
            progress=progress,
        )
        dense_shares = measuring.shares(tokens_SL)
        dense = measuring.dense(identity(experiment.model), run_id, journal, anew=experiment.rerun)
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
        losses, scores = measuring.quality("pruned")
        shares = measuring.shares(tokens_SL)
        peaks = ranks.gather(peak_mib(device))
        if not ranks.leads:
            return {}
        with stages("bench"):
            timed = _timed(experiment, blocks, pruned)
        by_window = {"dense": dense.losses, "pruned": losses}
        mask_bytes = audit.write(folder, pruned.keeps, pruned.orders, tokens_SL, by_window, pruned.channels)
        record = build(
            run={
                "id": run_id,
                "name": name,
                "config": config,
                "environment": software,
                "model": experiment.model.title,
            },
            size=size,
            pattern=method.pattern,
            pruned=pruned,
            measured=measuring.report(dense, losses, scores, (dense_shares, shares), tokens_SL),
            clock=clock,
            journal=journal,
            mask_bytes=mask_bytes,
            peaks=peaks,
        )
        if timed.rows:
            record |= {"latency": timed.rows, "limits": timed.limits}
        with stages("export"):
            exported = experiment.export.write(Finished(blocks, tokenizer, pruned, tokens_SL, record, folder))
        if exported is not None:
            record |= {"export": exported} | clock.read(journal)
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
