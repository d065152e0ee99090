"""One experiment from its settings to its record: the table of contents of the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esparse.parallel.ranks import Ranks
from esparse.records import audit
from esparse.records.report import write_json
from esparse.run.inputs import load_inputs, open_journal
from esparse.run.measure import Measuring
from esparse.run.progress import Progress
from esparse.run.record import Clock, build, environment, peak_mib
from esparse.run.settings import Experiment
from esparse.run.steps import export_model, prune_model, time_products
from esparse.run.tracking import NoTracking


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

    If there are several ranks, each calls it; the first one writes the files. `again`: the next run of this process
    prunes the same model.
    """
<<<<<<< HEAD
    ranks, method = ranks or Ranks(), experiment.method()
=======
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
>>>>>>> walkcheck
    device = experiment.model.all_devices()[ranks.rank]
    clock = Clock.start(device)
    experiment.bench.require(device)
    software = environment(device, ranks.size)
<<<<<<< HEAD
    with clock.stages("load"):
        inputs = load_inputs(experiment, method, device, config=config, folder=folder, ranks=ranks, again=again)
        journal = open_journal(experiment, inputs, software, run_id, folder)
=======
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
>>>>>>> walkcheck
    tracking = experiment.tracking if ranks.leads else NoTracking()
    with (
        journal,
        tracking.run(run_id=run_id, name=name, config=config, folder=folder) as sink,
        Progress(len(inputs.blocks.blocks), shown=ranks.leads) as progress,
    ):
        measuring = Measuring(experiment, inputs, clock.stages, progress)
        dense = measuring.dense(run_id, journal, anew=experiment.rerun)
        pruned = prune_model(
            experiment, method, inputs, journal=journal, stages=clock.stages, progress=progress, sink=sink
        )
        after = measuring.pruned()
        peaks = ranks.gather(peak_mib(device))
        if not ranks.leads or inputs.sources is None:
            return {}
        timed = time_products(experiment, inputs, pruned, clock.stages)
        losses = {"dense": dense.losses, "pruned": after.losses}
        mask_bytes = audit.write(folder, pruned.keeps, pruned.orders, inputs.tokens_SL, losses, pruned.channels)
        record = build(
            {"id": run_id, "name": name, "config": config, "environment": software},
            inputs.sources.record(),
            experiment.model.title,
            inputs.size,
            pruned,
            pattern=method.pattern,
            measured=measuring.report(dense, after),
            clock=clock,
            journal=journal,
            mask_bytes=mask_bytes,
            peaks=peaks,
        )
        record |= timed
        record |= export_model(experiment, inputs, pruned, record, folder=folder, clock=clock, journal=journal)
        sink.finish(record)
        write_json(folder / "result.json", record)
    return record
