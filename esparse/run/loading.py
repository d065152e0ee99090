"""What a run works on: the loaded model, the texts as tokens, the tasks, and the journal of its finished blocks.

Shapes: S calibration sequences, L their tokens, W windows of a corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esparse.data.overlap import warn_if_shared
from esparse.data.tokens import check_ids, warn_if_poor
from esparse.models import host_memory
from esparse.models.blocks import BlockModel
from esparse.models.forward_check import check
from esparse.models.load import load, longest_sequence, weight_files
from esparse.models.offload import HiddenStateStore
from esparse.parallel.ranks import Ranks
from esparse.pruning.journal import Journal
from esparse.pruning.method import Method
from esparse.pruning.prune import check_skip, check_store
from esparse.pruning.rounding import check_widths
from esparse.records.sources import Sources
from esparse.run.measure import digests
from esparse.run.record import STATE_DEPENDS_ON, Size
from esparse.run.settings import Experiment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(kw_only=True, frozen=True, slots=True, eq=False)
class Inputs:
    """A model that is about to be pruned, and all that it is calibrated and measured on."""

    blocks: BlockModel
    tokenizer: Tokenizer
    size: Size
    longest: int  # tokens of a sequence that the model takes
    tokens_SL: Tensor
    further: list[Tensor]  # other samples of the calibration's text, S x L each, that a recovery asks for
    windows: dict[str, Tensor]  # W windows by corpus
    tasks: dict[str, Any]  # as `zeroshot.load` gave them
    sources: Sources | None  # the files that all this was read from; the first rank's alone

    def digests(self) -> dict[str, str]:
        """A digest of the tokens of every text."""
        further = {f"calibration, sample {i}": tokens_SL for i, tokens_SL in enumerate(self.further, start=2)}
        return digests(self.windows | {"calibration": self.tokens_SL} | further)


def load_inputs(
    experiment: Experiment,
    method: Method,
    device: torch.device,
    *,
    config: Mapping[str, Any],
    folder: Path,
    ranks: Ranks,
    again: bool,
) -> Inputs:
    """Loads the model and reads the texts; whatever the method, the export or the bench cannot take ends here.

    The first rank alone reads texts, so that all ranks have the same. `again` as in `experiment.run`.
    """
    sources = Sources.begin(config) if ranks.leads else None
    asked = experiment.model
    model, tokenizer, store = load(asked, folder / "blocks", ranks, again=again)
    blocks = BlockModel(
        model,
        device=device,
        batch_tokens=asked.tokens_at_once(device),
        store=store,
        hidden_store=HiddenStateStore(asked.activations, folder),
        ranks=ranks,
    )
    check_store(blocks, method)
    experiment.export.ready(blocks, experiment.recovery, folder)
    experiment.bench.ready(model)
    check_widths(blocks, method, asked.skip)
    check_skip(blocks.by_name(), asked.skip, method.recovery)
    longest, texts = longest_sequence(model), experiment.evaluate
    family, embedded = model.config.model_type, model.get_input_embeddings().weight.shape[0]
    tokens_SL = ranks.from_first(lambda: experiment.calibration.sample(tokenizer, longest, family))
    others = experiment.calibration.further(method.recovery.further_samples())
    further = ranks.from_first(lambda: [other.sample(tokenizer, longest, family) for other in others])
    windows = ranks.from_first(
        lambda: {texts.name(c): texts.windows(c, tokenizer, longest, family) for c in texts.corpora}
    )
    for text, ids in {"the calibration text": torch.cat([tokens_SL, *further]), **windows}.items():
        check_ids(text, ids, embedded)
    if ranks.leads:
        for name, windows_WL in windows.items():
            warn_if_shared(name, tokens_SL, windows_WL)
        for name, tokens in {"the calibration text": tokens_SL, **windows}.items():
            warn_if_poor(name, tokens, tokenizer)
    check(blocks, tokens_SL)
    host_memory.trim()  # reading texts takes many times what their tokens do
    return Inputs(
        blocks=blocks,
        tokenizer=tokenizer,
        size=Size.of(model),
        longest=longest,
        tokens_SL=tokens_SL,
        further=further,
        windows=windows,
        tasks=experiment.zeroshot.load(),
        sources=sources,
    )


def open_journal(
    experiment: Experiment, inputs: Inputs, software: dict[str, Any], run_id: str, folder: Path
) -> Journal:
    """The journal of this run's earlier attempts, if everything that their blocks depend on is the same now."""
    ranks = inputs.blocks.ranks
    state = {
        "id": run_id,
        "software": {part: software[part] for part in STATE_DEPENDS_ON},
        "tokens": inputs.digests(),
        "tasks": experiment.zeroshot.stamps(),
        "weights": [getattr(inputs.blocks.model.config, "_commit_hash", None), *weight_files(experiment.model)],
    }
    journal = ranks.from_first(
        lambda: Journal.open(folder / "blocks", state, snapshot_seconds=experiment.snapshot_seconds)
    )
    journal.writes = ranks.leads
    return journal
