"""One experiment from its settings to its record: the table of contents of the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esparse.bench import NoBench
from esparse.export import NoExport
from esparse.parallel.ranks import Ranks
from esparse.records import audit
from esparse.records.report import write_json
from esparse.run.loading import load_inputs, open_journal
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
    place: str = "",
) -> dict[str, Any]:
    """Prunes one model, measures it before and after, and leaves the record in `folder`; returns the record.

    If there are several ranks, each calls it; the first one writes the files. `again`: the next run of this process
    prunes the same model. `place`: which run of a sweep it is, for the progress bar.
    """
    ranks, method = ranks or Ranks(), experiment.method()
    device = experiment.model.all_devices()[ranks.rank]
    clock = Clock.start(device)
    experiment.bench.require(device)
    software = environment(device, ranks.size)
    with clock.stages("load"):
        inputs = load_inputs(experiment, method, device, config=config, folder=folder, ranks=ranks, again=again)
        journal = open_journal(experiment, inputs, software, run_id, folder)
    tracking = experiment.tracking if ranks.leads else NoTracking()
    with (
        journal,
        tracking.run(run_id=run_id, name=name, config=config, folder=folder) as sink,
        Progress(len(inputs.blocks.blocks), shown=ranks.leads, run=place) as progress,
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
        if not isinstance(experiment.bench, NoBench):
            progress.stage("timing dense against sparse")
        timed = time_products(experiment, inputs, pruned, clock.stages)
        losses = {"dense": dense.losses, "pruned": after.losses}
        mask_bytes = audit.write(
            folder, pruned.keeps, pruned.orders, inputs.tokens_SL, losses, pruned.channels, pruned.grids
        )
        record = build(
            {"id": run_id, "name": name, "config": config, "environment": software},
            inputs.sources.record(),
            experiment.model.display_name,
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
        if not isinstance(experiment.export, NoExport):
            progress.stage("exporting")
        record |= export_model(experiment, inputs, pruned, record, folder=folder, clock=clock, journal=journal)
        sink.finish(record)
        write_json(folder / "result.json", record)
    return record
