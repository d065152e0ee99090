"""What `import esparse` offers from Python: prune, measure, pack and save a model that lies in memory.

    import esparse
    report = esparse.prune(model, tokenizer, "2:4")
    print(report, esparse.perplexity(model, tokenizer, "wikitext2"))
    esparse.save(model, tokenizer, report, "DIR", packed=True)

Nothing here writes a file unless asked to, sets up logging, or keeps anything beyond the call; several threads may work
on several models. What is wrong with the arguments is a `ValueError` of one sentence, before anything is changed.

Shapes: S sequences, W windows, L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esparse import patterns
from esparse.api.method_parts import IMPLIED, option, parts_of, plain
from esparse.api.pruning_report import Report
from esparse.api.refusals import as_found, check_kind, check_model, check_same
from esparse.api.token_sources import calibration_tokens, in_words, windows
from esparse.errors import Mistake
from esparse.export import Finished
from esparse.export.in_memory import pack_layers
from esparse.models.blocks import BlockModel
from esparse.models.load import usual_tokens_at_once
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
    from esparse.recoveries import Recovery
    from esparse.shuffles import Shuffle
    from esparse.updates import Update

__all__ = ["Report", "option", "pack", "perplexity", "prune", "register", "save"]


def prune(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    pattern: str = "2:4",
    *,
    metric: str | Metric = "entropy",
    shuffle: str | Shuffle | None = IMPLIED,
    update: str | Update | None = IMPLIED,
    recovery: str | Recovery | None = "none",
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
    """Prunes a causal language model of transformers in place, block after block; E-Sparse unless told otherwise.

    A part is a name of the command line, with the numbers of conf/, or an object: `option("metric", "entropy",
    alpha=0.5)`, or one of your own class; None is none. By itself the shuffle is that of the metric's paper (entropy:
    esparse; others: none), the update likewise (sparsegpt: its own). `calibration`: a corpus by name (builtin, c4,
    ...), a file (.txt, .jsonl, .parquet), texts, or tokens (S x L), for which no tokenizer is needed; `sequences` and
    `length` are of what is cut out of a text. `skip`: regular expressions of layer names that stay dense. `device`:
    computes, block by block, for a model that lies elsewhere. `progress`: a bar; None shows it on a terminal.

    Mode, experts implementation, hooks and requires_grad of the model are afterwards as they were, also after an
    exception; weights of the blocks that were done by then are pruned. Raises ValueError for what cannot be pruned or
    does not go together, OSError and ConnectionError for a text that cannot be had.
    """
    check_model(model)
    _check_seed(seed)
    asked = {
        "metric": metric,
        "shuffle": shuffle,
        "update": update,
        "recovery": recovery,
        "prepare": prepare,
        "allocation": allocation,
    }
    parts, choices = parts_of(asked, seed)
    method = Method(pattern=patterns.parse(pattern, outliers), seed=seed, **parts)
    method.check()
    tokens_SL = calibration_tokens(model, tokenizer, calibration, sequences=sequences, length=length, seed=seed)
    config = {
        "pattern": str(pattern),
        "outliers": outliers,
        "seed": seed,
        "model": {"name": None, "path": model.name_or_path or type(model).__name__, "skip": list(skip)},
        "calibration": in_words(calibration, tokens_SL, seed),
        **{group: plain(part) for group, part in parts.items()},
        "choices": choices,
    }
    began, stages = time.perf_counter(), Stages()
    with as_found(model), _bar(model, progress) as on_layer:
        blocks = _blocks(model, device, batch_tokens)
        pruned = pruning.prune(blocks, tokens_SL, method, skip=skip, stages=stages, on_layer=on_layer)
    seconds = round(time.perf_counter() - began, 3)
    return Report(pruned, method, tokens_SL, config, record.Size.of(model), stages, seconds, blocks.device)


def perplexity(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    text: str | Path | Sequence[str] | Tensor = "builtin",
    *,
    length: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
) -> float:
    """exp of the mean loss over windows of a text, as a run of esparse measures it.

    `text`: a corpus by name, a file, texts, or windows of tokens (W x L). Raises as `prune`.
    """
    from esparse.evaluate.perplexity import mean_loss
    from esparse.evaluate.perplexity import perplexity as of_losses

    check_kind(model)
    windows_WL = windows(model, tokenizer, text, length=length, max_tokens=max_tokens)
    device = model.get_input_embeddings().weight.device
    at_once = max(1, (batch_tokens or usual_tokens_at_once(device)) // windows_WL.shape[1])
    losses: list[float] = []
    with as_found(model, experts=False), torch.no_grad():
        for tokens_BL in windows_WL.split(at_once):
            logits_BLV = model(input_ids=tokens_BL.to(device), use_cache=False).logits
            losses += [mean_loss(*window) for window in zip(logits_BLV, tokens_BL, strict=True)]
    losses_W = torch.tensor(losses, dtype=torch.float64)
    if not torch.isfinite(losses_W).all():
        raise ValueError("the perplexity is not a finite number: the model's logits hold NaN or Inf")
    return of_losses(losses_W)


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
    """Writes the pruned model as a checkpoint with a model card, whole or not at all; returns its path, format, bytes.

    An ordinary checkpoint with zeros, or, `packed`, without them: transformers loads that after `import esparse`.
    `dtype` and `order` as export.dtype and export.order of the command line. Raises ValueError for a report of another
    model, OSError for a disk that is full.
    """
    check_model(model)
    check_same(model, report)
    changes = {"path": str(folder), "dtype": dtype} | ({} if order is None else {"order": order})
    export = option("export", "packed" if packed else "dense", **changes)
    export.check(report.method.pattern, report.method.recovery, shuffled=bool(report.orders))
    with as_found(model):
        blocks = _blocks(model, None, None)
        export.ready(blocks, report.method.recovery, Path(folder))
        finished = Finished(blocks, tokenizer, report.pruned, report.tokens_SL, report.to_dict(), Path(folder))
        written: dict[str, Any] = export.write(finished)
    return written


def pack(model: PreTrainedModel, report: Report) -> dict[str, str]:
    """Puts layers without zeros into the model, in place; returns the weights that stay dense, each with the reason.

    The model then computes from packed weights, and can be neither pruned nor saved any more. Raises ValueError for a
    pattern that has no groups of n:m, and if the weights no longer hold it.
    """
    check_model(model)
    check_same(model, report)
    if not report.method.pattern.parts():
        raise Mistake(f"what is packed are patterns of n:m, and {report.method.pattern} is none")
    left = pack_layers(model, report.pruned.groupings)
    if any(matrix.expert is not None and matrix.entry not in left for matrix, _ in report.pruned.groupings):
        model.set_experts_implementation("eager")  # the others multiply all experts of a parameter at once
    return left


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise Mistake(f"seed must be an integer, got {seed!r}")


def _blocks(model: PreTrainedModel, device: str | torch.device | None, batch_tokens: int | None) -> BlockModel:
    computes = model.device if device is None else torch.device(device)
    if computes.type == "cuda" and not torch.cuda.is_available():
        raise Mistake(f"device={computes} asks for a GPU, and PyTorch {torch.__version__} sees none here")
    if batch_tokens is not None and batch_tokens < 1:
        raise Mistake(f"batch_tokens must be positive, got {batch_tokens}")
    return BlockModel(model, device=computes, batch_tokens=batch_tokens or usual_tokens_at_once(computes))


@contextmanager
def _bar(model: PreTrainedModel, shown: bool | None) -> Iterator[Callable[[int, LayerReport], None]]:
    """A progress bar over the blocks; gives what is to be called after each layer."""
    from tqdm import tqdm

    from esparse.models.blocks import find_blocks

    disable = None if shown is None else not shown  # None: tqdm looks whether there is a terminal
    with tqdm(total=len(find_blocks(model)[1]), desc="pruning", unit="block", disable=disable, leave=False) as bar:

        def on_layer(block: int, layer: LayerReport) -> None:
            bar.set_postfix_str(layer.name.rpartition(".")[2], refresh=False)
            bar.update(block - bar.n)

        yield on_layer
