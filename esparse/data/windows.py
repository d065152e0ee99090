"""The windows on which esparse/evaluate measures perplexity.

Shapes: W windows, L tokens of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.data import corpora
from esparse.data.lengths import sequence_length
from esparse.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from esparse.data.corpora import Corpus


@dataclass(kw_only=True, slots=True)
class Perplexity:
    """The group `evaluate`: the texts on which perplexity is measured, and the length of the windows."""

    corpora: list[str]  # names of corpora: builtin, wikitext2, c4, ptb, text
    path: str | None = None  # the file of the corpus `text`: .txt, .jsonl, .json, .jsonl.gz, .json.gz or .parquet
    column: str = "text"  # its column that holds the text, in all but .txt
    chat: bool = False  # whether its rows are chats (`messages`), which the tokenizer's chat template renders
    bos: Any = "auto"  # auto (what the family expects) | true | false: a beginning token in front of each window
    length: int | None  # tokens of a window; null: 2048, or what the model takes if that is less
    # Of a text file then only the beginning is read
    max_tokens: int | None  # tokens of each corpus, from its start; null: all

    def __post_init__(self) -> None:
        corpora.check(self.corpora, "evaluation", self.path)
        corpora.check_settings("evaluate", bos=self.bos, chat=self.chat, path=self.path)
        if self.length is not None and self.length < 2:
            raise Mistake(f"evaluate.length must be at least 2 (a token and its next) or null, got {self.length}")
        if self.max_tokens is not None and self.max_tokens < (self.length or 2):
            raise Mistake(f"evaluate.max_tokens={self.max_tokens} leaves no window of {self.length or 2} tokens")

    def name(self, corpus: str) -> str:
        """A corpus's name in records: its own name; for `text` the file's name."""
        return Path(self.path).name if corpus == "text" and self.path else corpus

    def windows(self, corpus: str, tokenizer: Tokenizer, longest: int, family: str = "") -> Tensor:
        """The consecutive windows_WL (int64, without overlap, padding and tail) of one of the corpora.

        `longest`: the longest sequence of the model; `family`: the model's family, which may expect a beginning token.
        Raises Mistake if the length is too long for the model or the text too short for one window, and as
        `corpora.read` does.
        """
        from esparse.data import tokens

        path = self.path if corpus == "text" else None
        render = tokens.chat_template(tokenizer, "evaluate.chat") if self.chat else None
        text = corpora.read(corpus, "evaluation", path=path, column=self.column, render=render)
        return self.windows_of(text, tokenizer, longest, family)

    def windows_of(self, text: Corpus, tokenizer: Tokenizer, longest: int, family: str = "") -> Tensor:
        """`windows` for a text that was read already."""
        from esparse.data import tokens

        length = sequence_length(self.length, longest, "evaluate.length")
        begin = tokens.beginning(self.bos, tokenizer, family, "evaluate.bos")
        tokens_T = tokens.stream(text, tokenizer, at_most=self.max_tokens)
        windows_WL = tokens.windows(tokens_T, length, begin)[: text.most_windows]
        if self.max_tokens is not None:
            windows_WL = windows_WL[: self.max_tokens // length]
        if not len(windows_WL):
            limit = "" if self.max_tokens is None else f" (evaluate.max_tokens={self.max_tokens})"
            raise Mistake(
                f"the evaluation corpus {text.name} has {len(tokens_T)} tokens{limit}, too few for one window of "
                f"{length}: use a longer text or set evaluate.length lower"
            )
        return windows_WL
