"""A dry run, `dry_run=true`: what a run would take, said in words, without doing it."""

from __future__ import annotations

from dataclasses import replace

import torch

from esparse.data.corpora import HUB
from esparse.data.windows import Perplexity
from esparse.models.load import Model
from esparse.run.duration import measured, published
from esparse.run.plan import USUAL_LENGTH, Plan, plan
from esparse.run.progress import clock
from esparse.run.settings import Experiment


def dry_run(experiment: Experiment, *, name: str) -> str:
    """What the run would take, in words; nothing is loaded but the model's configuration.

    For this machine, or for the GPU that `dry_run` names.
    """
    calibration, evaluate, model = experiment.calibration, experiment.evaluate, experiment.model
    elsewhere = experiment.dry_run is not True or (
        model.devices.startswith("cuda") and not torch.cuda.is_available()
    )  # the devices of this machine say nothing then
    rates = None if experiment.dry_run is True else published(str(experiment.dry_run))
    made = plan(
        model,
        experiment.method(),
        display_name=name,
        sequences=calibration.sequences,
        length=calibration.length,
        window=evaluate.length,
        ranks=1 if elsewhere else len(experiment.devices()),
        device="cuda" if elsewhere else None,
        evaluated=_evaluated(evaluate),
        gpu_memory=None if rates is None or rates.memory is None else int(rates.memory),
    )
    if rates is not None:
        return in_words(replace(made, rates=rates))
    if elsewhere:
        return in_words(made)
    device = model.device()
    dtype = torch.float32 if device.type == "cpu" and model.dtype == "auto" else _dtype(model)
    return in_words(replace(made, rates=measured(device, dtype)))


def _dtype(model: Model) -> torch.dtype:
    return torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype)


def _evaluated(evaluate: Perplexity) -> dict[str, int | None]:
    """How many tokens of each corpus are measured; None where that is not known before it is read."""
    known: dict[str, int | None] = {}
    for corpus in evaluate.corpora:
        text = HUB.get(corpus, {}).get("evaluation")
        windows = text.most_windows * (evaluate.length or USUAL_LENGTH) if text and text.most_windows else None
        limits = [limit for limit in (evaluate.max_tokens, windows) if limit is not None]
        known[evaluate.name(corpus)] = min(limits) if limits else None
    return known


def in_words(made: Plan) -> str:
    """The plan as text, one line per number."""
    where = "read block by block from the checkpoint" if made.streams_weights else "loaded whole"
    where += f", by each of {made.ranks} processes" if made.ranks > 1 else ""
    lines = [
        f"plan of {made.display_name} (a dry run: nothing is pruned)",
        f"  parameters          {made.parameters:,} in {made.blocks} blocks, {made.pruned_weights:,} to be pruned",
        f"  weights             {_gib(made.weights)}, {where}",
        f"  largest block       {_gib(made.largest_block)}; embeddings, norm and head {_gib(made.ends)}",
        f"  hidden states       {_gib(made.stream)} x {made.streams}, "
        f"{_where(made)}; {_gib(made.window)} per evaluation window",
        f"  statistics          {_gib(made.statistics)} for one block; gradients {_gib(made.gradients)}; "
        f"inputs held for a second pass {_gib(made.held)}" + f"; a dense copy {_gib(made.copied)}" * (made.copied > 0),
        f"  masks               {_gib(made.masks)}",
        f"  forward passes      {made.passes} at most of the calibration sequences and 2 of the evaluation windows",
    ]
    for stage, (host, device) in made.peaks().items():
        on_device = "" if made.on_cpu else f", device about {_gib(device)}"
        lines.append(f"  peak, {stage:13} host about {_gib(host)}{on_device}")
    lines += _times(made)
    lines.append("  Peaks count tensors and are estimates; Python and its libraries take 0.5 GiB and more on top.")
    return "\n".join(lines)


def _where(made: Plan) -> str:
    if made.on_device:
        return "on the device"
    return "in files of the run" if made.on_disk else "in memory"


def _times(made: Plan) -> list[str]:
    """The lines about arithmetic and seconds."""
    work, rates = made.work, made.rates
    parts = {
        "calibration": work.calibration,
        "statistics": work.statistics,
        "training": work.training,
        "evaluation": work.evaluation,
    }
    counted = ", ".join(f"{part} {flop / 1e12:,.2f}" for part, flop in parts.items() if flop)
    lines = [f"  arithmetic          {work.arithmetic / 1e12:,.2f} TFLOP in passes through the model:"]
    lines += [f"                      {counted}"] if counted else []
    if work.not_counted:
        lines.append(f"                      not counted: {', '.join(work.not_counted)}, whose text is not read yet")
    if rates is None:
        return [*lines, "  time                not estimated: dry_run=a100 plans for a GPU by name"]
    how = f"{rates.arithmetic / 1e12:,.4g} TFLOP/s and {rates.copy / 1e9:,.4g} GB/s"
    seconds = clock(rates.seconds(work) / (1 if rates.source else made.ranks))
    if rates.source is None:
        lines.append(
            f"  time                about {seconds} for these on {rates.name} (estimated from {how}, measured)"
        )
    else:
        lines.append(f"  time                {seconds} at least for these on one {rates.name}: estimated from {how},")
        lines.append(f"                      the published rates ({rates.source}), which no program reaches")
    if rates.memory is not None and not made.on_cpu:
        need, stage = max((device, stage) for stage, (_, device) in made.peaks().items())
        fits = "fits into" if need < rates.memory else "does not fit into"
        lines.append(f"  memory              the largest peak ({stage}) {fits} its {rates.memory / 2**30:,.1f} GiB")
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"
