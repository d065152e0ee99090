"""The steps of a run after its measurements are set up: prune, time the products, export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from esparse.bench import LayerShape, Subject, in_words
from esparse.export import Finished
from esparse.patterns import NM
from esparse.pruning.journal import Journal
from esparse.pruning.method import Method
from esparse.pruning.outcome import Pruned
from esparse.pruning.prune import prune
from esparse.records.report import LayerReport, Stages
from esparse.run.loading import Inputs
from esparse.run.progress import Progress
from esparse.run.record import Clock
from esparse.run.settings import Experiment
from esparse.run.tracked_values import BlockHistory
from esparse.run.tracking import Sink

log = logging.getLogger("esparse")


def prune_model(
    experiment: Experiment,
    method: Method,
    inputs: Inputs,
    *,
    journal: Journal,
    stages: Stages,
    progress: Progress,
    sink: Sink,
) -> Pruned:
    """Prunes the model block after block, and reports every layer to the terminal and the tracking."""

    def on_layer(block: int, layer: LayerReport) -> None:
        progress.layer(block, layer)
        history.add(block, layer)

    history = BlockHistory(sink.log)
    for index in range(sink.logged, journal.finished):  # an attempt that goes on has a W&B run with the whole history
        for earlier in journal.read(index).facts["layers"]:
            history.add(index, LayerReport(**earlier))
    progress.pruning()
    pruned = prune(
        inputs.blocks,
        inputs.tokens_SL,
        method,
        further=inputs.further,
        skip=experiment.model.skip,
        stages=stages,
        on_layer=on_layer,
        journal=journal,
        profile=experiment.profile,
    )
    history.close()
    progress.block_done()
    return pruned


def time_products(experiment: Experiment, inputs: Inputs, pruned: Pruned, stages: Stages) -> dict[str, Any]:
    """Dense against sparse, as `bench` asks: the sections of the record, none if nothing is asked for."""
    pattern, blocks = experiment.parsed_pattern(), inputs.blocks
    with stages("bench"):
        if not isinstance(pattern, NM):  # only bench=none takes any other
            return {}
        layers = [LayerShape(layer.name, *layer.shape) for layer in pruned.layers]
        subject = Subject(blocks.model, layers, pruned.keeps, pruned.orders, pattern, blocks.device)
        timed = experiment.bench.run(subject)
        for row in timed.rows:
            log.info("%s", in_words(row))
    return {"latency": timed.rows, "limits": timed.limits} if timed.rows else {}


def export_model(
    experiment: Experiment,
    inputs: Inputs,
    pruned: Pruned,
    record: dict[str, Any],
    *,
    folder: Path,
    clock: Clock,
    journal: Journal,
) -> dict[str, Any]:
    """Writes the checkpoint that `export` asks for: the section of the record and the seconds until now, or nothing."""
    with clock.stages("export"):
        finished = Finished(inputs.blocks, inputs.tokenizer, pruned, inputs.tokens_SL, record, folder)
        exported = experiment.export.write(finished)
    if exported is not None:
        log.info(
            "exported to %s: %.1f MB; %s holds as stored in %d of %d layers; %s",
            exported["path"],
            exported["bytes"] / 1e6,
            record["sparsity"]["pattern"],
            exported["holds_in"],
            exported["of_layers"],
            exported["engines"],
        )
    return {} if exported is None else {"export": exported} | clock.read(journal)
