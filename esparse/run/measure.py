"""Measures a run's model, dense and pruned: perplexities, accuracies on tasks, shares of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from torch import Tensor

from esparse.evaluate import zeros
from esparse.evaluate.perplexity import perplexity, window_losses
from esparse.evaluate.zeroshot import Scores
from esparse.models.load import identity
from esparse.pruning.journal import Dense, Journal
from esparse.records.report import Stages
from esparse.run.progress import Progress
from esparse.run.settings import Experiment

if TYPE_CHECKING:
    from esparse.run.loading import Inputs

# Cache: results for the last dense model measured in this process, keyed by everything they depend on. Runs of a sweep
# that prune the same model measure it once; the record says which run did.
dense_known: dict[str, Dense] = {}


@dataclass(frozen=True, slots=True)
class Quality:
    """Measurements of one model: losses (nats) of every window by corpus, accuracies, shares of zeros."""

    losses: dict[str, Tensor]
    scores: Scores
    shares: zeros.Shares


@dataclass(slots=True)
class Measuring:
    """Measures a run's model before and after pruning; if there are several ranks, every one of them measures."""

    experiment: Experiment
    inputs: Inputs
    stages: Stages
    progress: Progress
    dense_run: str = ""  # which run measured the dense model

    def dense(self, run_id: str, journal: Journal, *, anew: bool) -> Quality:
        """The dense model's quality, measured now, by an earlier attempt, or by an earlier run of this process."""
        shares, ranks = self._shares("dense"), self.inputs.blocks.ranks
        known = ranks.from_first(journal.dense)
        if known is None:
            zeroshot = self.experiment.zeroshot
            model, windows = identity(self.experiment.model), digests(self.inputs.windows)
            asked = f"{model} {windows} {zeroshot} {zeroshot.stamps()}"
            if anew or asked not in dense_known:
                measured = Dense(run_id, *self._quality("dense"))
                dense_known.clear()
                dense_known[asked] = measured
            known = dense_known[asked]
            journal.write_dense(known)
        self.dense_run = known.run
        return Quality(known.losses, known.zeroshot, shares)

    def pruned(self) -> Quality:
        """The pruned model's quality."""
        losses, scores = self._quality("pruned")
        return Quality(losses, scores, self._shares("pruned"))

    def report(self, dense: Quality, pruned: Quality) -> dict[str, Any]:
        """The record's sections with the measurements."""
        report: dict[str, Any] = {
            "quality": {
                corpus: {
                    "dense": perplexity(dense.losses[corpus]),
                    "pruned": perplexity(pruned.losses[corpus]),
                    "tokens": windows_WL.numel(),
                    "sequence_length": windows_WL.shape[1],
                    "dense_run": self.dense_run,
                    "bos": self._begins(windows_WL),
                }
                for corpus, windows_WL in self.inputs.windows.items()
            },
            "calibration": {
                "bos": self._begins(self.inputs.tokens_SL),
                "further_sequences": sum(map(len, self.inputs.further)),
            },
        }
        if pruned.scores:
            report["zeroshot"] = self.experiment.zeroshot.report(dense.scores, pruned.scores, self.dense_run)
        if self.experiment.profile:
            report["profile"] = zeros.report(dense.shares, pruned.shares, self.inputs.tokens_SL)
        return report

    def _begins(self, tokens_SL: Tensor) -> bool:
        """Whether every sequence begins with the beginning token."""
        token = self.inputs.tokenizer.bos_token_id
        return token is not None and bool((tokens_SL[:, 0] == token).all())

    def _quality(self, which: str) -> tuple[dict[str, Tensor], Scores]:
        """Losses and accuracies; `which`: dense or pruned, for the progress bar."""
        evaluating, inputs = self.progress.evaluating, self.inputs
        with self.stages("evaluate"):
            losses = {
                corpus: window_losses(inputs.blocks, windows_WL, evaluating(f"{which} on {corpus}"))
                for corpus, windows_WL in inputs.windows.items()
            }
        with self.stages("zeroshot"):
            zeroshot = self.experiment.zeroshot
            on_block = evaluating(f"{which} on tasks") if inputs.tasks.get("tasks") else _unseen
            return losses, zeroshot.measure(inputs.tasks, inputs.blocks, inputs.tokenizer, inputs.longest, on_block)

    def _shares(self, which: str) -> zeros.Shares:
        """Zeros and near zeros on some of the calibration sequences, if `profile` asks for them."""
        blocks, tokens_SL = self.inputs.blocks, self.inputs.tokens_SL
        with self.stages("profile"):
            if not self.experiment.profile:
                return {}
            self.progress.stage(f"looking at the {which} model's zeros")
            return blocks.ranks.from_first(lambda: zeros.shares(blocks, tokens_SL))


def _unseen(index: int) -> None:
    """Nothing is shown of what is not asked for."""


def digests(tokens: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest of each tensor of tokens; the same tokens in windows of another length are another measurement."""
    return {name: f"{list(t.shape)} {sha256(t.numpy().tobytes()).hexdigest()}" for name, t in tokens.items()}
