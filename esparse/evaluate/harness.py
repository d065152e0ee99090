"""Adapts a model that is run block by block to lm-eval's interface of language models (lm-eval 0.4.13)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from esparse.errors import Mistake
from esparse.evaluate.likelihood import log_likelihoods
from esparse.models.blocks import BlockModel

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase as Tokenizer


class BlockLM(TemplateLM):
    """Answers lm-eval's requests for log-likelihoods block by block, with the same results as its HFLM."""

    def __init__(self, blocks: BlockModel, tokenizer: Tokenizer, longest: int, on_block: Callable[[int], None]) -> None:
        super().__init__()
        self.blocks, self.tokenizer, self.longest, self.on_block = blocks, tokenizer, longest, on_block
        self.cut: Counter[str] = Counter()  # by task: number of requests with a truncated context
        self._of_task: list[str] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._of_task = [request.task_name or "" for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._of_task = []

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False  # the text has its own special tokens
        asked = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **asked)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.longest:
                raise Mistake(
                    f"an answer of {len(continuation)} tokens does not fit into the {self.longest} that the model takes"
                )
            if len(context) + len(continuation) > self.longest + 1 and index < len(self._of_task):
                self.cut[self._of_task[index]] += 1
            # Truncates inputs that are too long at their beginning.
            pairs.append((tuple((context + continuation)[-(self.longest + 1) :][:-1]), tuple(continuation)))
        return log_likelihoods(self.blocks, pairs, self.on_block)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows without overlap that begin after one token of context."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        values = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum(next(values)[0] for _ in of_text) for of_text in windows]

    def _windows(self, text: str) -> Iterable[tuple[None, list[int], list[int]]]:
        for window in get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.longest,
            context_len=1,
        ):
            yield (None, *make_disjoint_window(window))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise AssertionError("ZeroShot.load refuses tasks that generate text")
