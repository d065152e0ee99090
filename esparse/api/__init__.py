"""The Python API of `import esparse`: prune, measure, pack and save a model in memory.

    import esparse
    report = esparse.prune(model, tokenizer, "2:4")
    print(report, esparse.perplexity(model, tokenizer, "wikitext2"))
    esparse.save(model, tokenizer, report, "DIR", packed=True)

The functions write files only on request, do not set up logging, and keep no state between calls, but for the tokens
that a model was calibrated on, which the model holds; several threads may work on several models. Wrong arguments raise
a `ValueError` with one sentence, before anything is changed.

Shapes: S sequences, W windows, L tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esparse import patterns
from esparse.api.calibrated import remember, warn_if_calibrated_on
from esparse.api.method_parts import IMPLIED, option, parts_of, plain
from esparse.api.pruning_report import Report
from esparse.api.refusals import (
    alone,
    as_found,
    as_usual,
    check_as_built,
    check_batch,
    check_kind,
    check_model,
    check_runs,
    check_same,
    warn_if_changed,
)
from esparse.api.token_sources import calibration_tokens, in_words, windows
from esparse.errors import Mistake
from esparse.export import Finished
from esparse.export.in_memory import pack_layers
from esparse.models.blocks import BlockModel
from esparse.models.damage import not_finite
from esparse.models.load import usual_tokens_at_once
from esparse.parts import expressions
from esparse.parts.plugins import register
from esparse.pruning import prune as pruning
from esparse.pruning.method import Method
from esparse.records.report import LayerReport, Stages
from esparse.run import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from esparse.allocations import Allocation
    from esparse.data.calibration import Calibration
    from esparse.metrics import Metric
    from esparse.prepare import Prepare
    from esparse.quantise import Quantise
    from esparse.recoveries import Recovery
    from esparse.shuffles import Shuffle
    from esparse.updates import Update

log = logging.getLogger("esparse")

__all__ = ["Report", "option", "pack", "perplexity", "prune", "register", "save"]


@as_usual
def prune(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    pattern: str = "2:4",
    *,
    metric: str | Metric = "sparsegpt",
    shuffle: str | Shuffle | None = IMPLIED,
    update: str | Update | None = IMPLIED,
    recovery: str | Recovery | None = "none",
    quantise: str | Quantise | None = "none",
    prepare: str | Prepare | None = "none",
    allocation: str | Allocation | None = "uniform",
    outliers: str | None = None,
    calibration: str | Path | Sequence[str] | Tensor | Calibration = "builtin",
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    device: str | torch.device | None = None,
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> Report:
    """Prunes a causal language model of transformers in place, block after block.

    A part is a name from the command line, with the numbers of conf/, or an object: `option("metric", "entropy",
    gamma=0.25)`, or an object of your own class; None means none. Default shuffle and update are those of the metric's
    paper (entropy: shuffle esparse; sparsegpt: its own update; others: none). `calibration`: a corpus by name (builtin,
    c4, ...), a file (.txt, .jsonl, .json, .jsonl.gz, .json.gz or .parquet), texts, or tokens (S x L), for which no
    tokenizer is needed; `sequences` and `length`: number and length of the sequences cut out of a text. `skip`: regular
    expressions of layer names that stay dense. `device`: the device that computes, block by block, if the model is on
    another one. `progress`: whether to show a bar; None: only on a terminal.

    The model's mode, experts implementation, hooks, gradients and requires_grad are restored, also after an exception;
    the weights of blocks that were finished before it are pruned. Raises ValueError for models that cannot be pruned
    and for parts that do not fit each other, OSError and ConnectionError for a text that cannot be read or fetched.
    """
    check_model(model)
    check_batch(batch_tokens)
    _check_seed(seed)
    expressions.check("skip", skip)
    asked = {
        "metric": metric,
        "shuffle": shuffle,
        "update": update,
        "recovery": recovery,
        "quantise": quantise,
        "prepare": prepare,
        "allocation": allocation,
    }
    parts, choices = parts_of(asked, seed)
    method = Method(pattern=patterns.parse(pattern, outliers), seed=seed, **parts)
    method.check()
    for group, why in method.idle().items():
        if asked[group] != IMPLIED:
            log.warning("%s=%s does nothing with the pattern %s, %s", group, choices[group], method.pattern, why)
    tokens_SL, *further = calibration_tokens(
        model,
        tokenizer,
        calibration,
        sequences=sequences,
        length=length,
        seed=seed,
        further=method.recovery.further_samples(),
    )
    config = {
        "pattern": str(pattern),
        "outliers": outliers,
        "seed": seed,
        "model": {"name": None, "path": model.name_or_path or type(model).__name__, "skip": list(skip)},
        "calibration": in_words(calibration, tokens_SL, seed),
        **{group: plain(part) for group, part in parts.items()},
        "choices": choices,
    }
    began = time.perf_counter()
    with as_found(model), _bar(model, progress) as on_layer:
        check_runs(model, tokens_SL)
        warn_if_changed(model, tokens_SL)
        blocks = _blocks(model, device, batch_tokens)
        stages = Stages(settle=record.waiting_for(blocks.device))
        remember(model, tokens_SL)  # from here on, weights depend on them
        pruned = pruning.prune(blocks, tokens_SL, method, further=further, skip=skip, stages=stages, on_layer=on_layer)
    seconds = round(time.perf_counter() - began, 3)
    return Report(pruned, method, tokens_SL, config, record.Size.of(model), stages, seconds, blocks.device)


@as_usual
def perplexity(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    text: str | Path | Sequence[str] | Tensor = "builtin",
    *,
    length: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
) -> float:
    """exp of the mean loss over windows of a text, measured as in a run of esparse.

    `text`: a corpus by name, a file, texts, or windows of tokens (W x L). Logs a warning if `prune` has calibrated this
    model, or the model that it is a copy of, on much of it. Raises as `prune` does.
    """
    from esparse.evaluate.perplexity import perplexity as of_losses
    from esparse.evaluate.whole_model import losses

    check_kind(model)
    check_batch(batch_tokens)
    windows_WL = windows(model, tokenizer, text, length=length, max_tokens=max_tokens)
    warn_if_calibrated_on(model, text, windows_WL)
    device = model.get_input_embeddings().weight.device
    at_once = max(1, (batch_tokens or usual_tokens_at_once(device)) // windows_WL.shape[1])
    with as_found(model, experts=False):
        check_runs(model, windows_WL)
        losses_W = losses(model, windows_WL, at_once)
    if not torch.isfinite(losses_W).all():
        what = "the perplexity is not a finite number: the model's logits hold NaN or Inf"
        raise not_finite(what, model.named_parameters())
    return of_losses(losses_W)


@as_usual
def save(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    report: Report,
    folder: str | Path,
    *,
    packed: bool = False,
    dtype: str = "auto",
    order: str | None = None,
) -> dict[str, Any]:
    """Writes the pruned model as a complete checkpoint with a model card, or nothing; returns path, format and bytes.

    The checkpoint is an ordinary one with zeros or, if `packed`, one without zeros, which transformers loads after
    `import esparse`. `dtype` and `order`: as export.dtype and export.order on the command line. Raises ValueError for a
    report of another model, OSError if the disk is full.
    """
    check_model(model)
    check_same(model, report)
    if not isinstance(folder, str | Path) or not str(folder).strip():
        raise Mistake(f"folder must name a folder, got {folder!r}")
    if not isinstance(packed, bool):
        raise Mistake(f"packed must be True or False, got {packed!r}")
    changes = {"path": str(folder), "dtype": dtype} | ({} if order is None else {"order": order})
    export = option("export", "packed" if packed else "dense", **changes)
    method = report.method
    export.check(method.pattern, method.recovery, method.shuffle, method.quantise)
    with as_found(model):
        blocks = _blocks(model, None, None)
        export.ready(blocks, report.method.recovery, Path(folder))
        check_runs(model, report.tokens_SL)
        check_as_built(model, report.tokens_SL)
        finished = Finished(blocks, tokenizer, report.pruned, report.tokens_SL, report.to_dict(), Path(folder))
        written: dict[str, Any] = export.write(finished)
    return written


@as_usual
def pack(model: PreTrainedModel, report: Report) -> dict[str, str]:
    """Replaces the model's layers by packed ones, in place; returns the weights that stay dense, each with the reason.

    The model then computes from packed weights, and can no longer be pruned or saved. Raises ValueError for a pattern
    without n:m groups, and if the weights no longer hold the pattern.
    """
    with alone(model):
        check_model(model)
        check_same(model, report)
        pattern, grid = report.method.pattern, report.pruned.grid
        if not pattern.parts() and (grid is None or str(pattern) != "dense"):
            raise Mistake(f"only n:m patterns and quantised weights can be packed, and {pattern} is none")
        left = pack_layers(model, report.pruned)
        if any(matrix.expert is not None and matrix.entry not in left for matrix, _ in report.pruned.groupings):
            model.set_experts_implementation("eager")  # other ways multiply all experts of a parameter at once
    return left


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise Mistake(f"seed must be an integer, got {seed!r}")


def _blocks(model: PreTrainedModel, device: str | torch.device | None, batch_tokens: int | None) -> BlockModel:
    computes = model.device if device is None else _device(device)
    return BlockModel(model, device=computes, batch_tokens=batch_tokens or usual_tokens_at_once(computes))


def _device(asked: str | torch.device) -> torch.device:
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Mistake(f"device must be cpu, cuda or cuda:N, got {asked!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "none"
        raise Mistake(f"device={device} asks for a GPU, and PyTorch {torch.__version__} sees {seen} here")
    return device


@contextmanager
def _bar(model: PreTrainedModel, shown: bool | None) -> Iterator[Callable[[int, LayerReport], None]]:
    """A progress bar over the blocks; yields the function to call after each layer."""
    from tqdm import tqdm

    from esparse.models.model_parts import find_blocks

    disable = None if shown is None else not shown  # None: tqdm checks for a terminal
    with tqdm(total=len(find_blocks(model)[1]), desc="pruning", unit="block", disable=disable, leave=False) as bar:

        def on_layer(block: int, layer: LayerReport) -> None:
            bar.set_postfix_str(layer.name.rpartition(".")[2], refresh=False)
            bar.update(block - bar.n)

        yield on_layer
