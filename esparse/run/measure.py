"""What a run measures of a model as it is, dense and pruned: perplexities, accuracies on tasks, shares of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from torch import Tensor

from esparse.evaluate import zeros
from esparse.evaluate.perplexity import perplexity, window_losses
from esparse.evaluate.zeroshot import Scores, ZeroShot
from esparse.models.blocks import BlockModel
from esparse.pruning.journal import Dense, Journal
from esparse.records.report import Stages
from esparse.run.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Of the last dense model measured in this process: what was asked, and what came out. The runs of a sweep that prune
# the same model then measure it once; the record says which run did.
dense_known: dict[str, Dense] = {}


@dataclass(kw_only=True, slots=True)
class Measuring:
    """One model with all that it is measured by; where there are several ranks, every one of them measures."""

    blocks: BlockModel
    tokenizer: Tokenizer
    longest: int  # tokens that the model takes
    windows: Mapping[str, Tensor]  # by corpus
    zeroshot: ZeroShot
    tasks: dict[str, Any]  # as `zeroshot.load` gave them
    profile: bool  # whether shares of zeros are looked at
    stages: Stages
    progress: Progress

    def quality(self, which: str) -> tuple[dict[str, Tensor], Scores]:
        """Losses by window of every corpus, and accuracies; `which`: what people are told, dense or pruned."""
        evaluating = self.progress.evaluating
        with self.stages("evaluate"):
            losses = {
                corpus: window_losses(self.blocks, windows_WL, evaluating(f"{which} on {corpus}"))
                for corpus, windows_WL in self.windows.items()
            }
        with self.stages("zeroshot"):
            on_block = evaluating(f"{which} on tasks")
            return losses, self.zeroshot.measure(self.tasks, self.blocks, self.tokenizer, self.longest, on_block)

    def dense(self, model: str, run_id: str, journal: Journal, *, anew: bool) -> Dense:
        """What was measured on the dense model, now or earlier; `model`: all that says which model it is."""
        if (known := self.blocks.ranks.from_first(journal.dense)) is not None:
            return known
        asked = f"{model} {digests(self.windows)} {self.zeroshot} {self.zeroshot.stamps()}"
        if anew or asked not in dense_known:
            measured = Dense(run_id, *self.quality("dense"))
            dense_known.clear()
            dense_known[asked] = measured
        journal.write_dense(dense_known[asked])
        return dense_known[asked]

    def shares(self, tokens_SL: Tensor) -> zeros.Shares:
        """Zeros and near zeros on some of the calibration sequences, where that is asked for."""
        with self.stages("profile"):
            return self.blocks.ranks.from_first(lambda: zeros.shares(self.blocks, tokens_SL)) if self.profile else {}

    def report(
        self,
        dense: Dense,
        losses: Mapping[str, Tensor],
        scores: Scores,
        shares: tuple[zeros.Shares, zeros.Shares],
        tokens_SL: Tensor,
    ) -> dict[str, Any]:
        """What the record says of all that was measured; losses and scores are the pruned model's, shares of both."""
        report: dict[str, Any] = {
            "quality": {
                corpus: {
                    "dense": perplexity(dense.losses[corpus]),
                    "pruned": perplexity(losses[corpus]),
                    "tokens": windows_WL.numel(),
                    "sequence_length": windows_WL.shape[1],
                    "dense_run": dense.run,
                    "bos": self._begins(windows_WL),
                }
                for corpus, windows_WL in self.windows.items()
            },
            "calibration": {"bos": self._begins(tokens_SL)},
        }
        if scores:
            report["zeroshot"] = self.zeroshot.report(dense.zeroshot, scores, dense.run)
        if self.profile:
            report["profile"] = zeros.report(*shares, tokens_SL)
        return report

    def _begins(self, tokens_SL: Tensor) -> bool:
        """Whether the beginning token stands in front of every sequence."""
        token = self.tokenizer.bos_token_id
        return token is not None and bool((tokens_SL[:, 0] == token).all())


def digests(tokens: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest of each tensor of tokens; the same tokens in windows of another length are another measurement."""
    return {name: f"{list(t.shape)} {sha256(t.numpy().tobytes()).hexdigest()}" for name, t in tokens.items()}
