"""The calibration sequences, which depend only on corpus, seed and tokenizer.

Shapes: S sequences, L tokens of each.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esparse.data import corpora
from esparse.data.lengths import sequence_length
from esparse.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = logging.getLogger("esparse")

SPARE = 16  # a stream of documents has this many times the requested tokens, if the corpus is large enough

FAR = 1_000_003


@dataclass(kw_only=True, slots=True)
class Calibration:
    """The group `calibration`: random sequences of a corpus, windows of its token stream or (C4) crops of documents."""

    corpus: str  # its name: builtin, wikitext2, c4, ptb, text
    # Rows without text are skipped and counted. Of a file of more than 8 million characters only what is needed is read
    # into memory and tokenised: its sequences are drawn by characters and begin with a word, those of a shorter one are
    # drawn by tokens
    path: str | None = None  # the file of the corpus `text`: .txt, .jsonl, .json, .jsonl.gz, .json.gz or .parquet
    column: str = "text"  # its column that holds the text, in all but .txt
    chat: bool = False  # whether its rows are chats (`messages`), which the tokenizer's chat template renders
    # With auto, for Gemma's families, which have been trained so, and for no others, as the literature has it
    bos: Any = "auto"  # auto (what the family expects) | true | false: a beginning token in front of each sequence
    sequences: int  # how many sequences
    length: int | None  # tokens of each; null: 2048, or what the model takes if that is less
    seed: int  # which sequences

    def __post_init__(self) -> None:
        corpora.check([self.corpus], "calibration", self.path)
        corpora.check_settings("calibration", bos=self.bos, chat=self.chat, path=self.path)
        if self.sequences < 1:
            raise Mistake(f"calibration.sequences must be at least 1, got {self.sequences}")
        if self.length is not None and self.length < 1:
            raise Mistake(f"calibration.length must be at least 1 or null, got {self.length}")

    def sample(self, tokenizer: Tokenizer, longest: int, family: str = "") -> Tensor:
        """The calibration tokens_SL (int64, without padding) for a model with sequences of up to `longest` tokens.

        `family`: the model's family, which may expect a beginning token. Of a file with more than 8 million characters,
        only the needed parts are tokenised. Windows of a stream may overlap and, rarely, repeat. A stream has its
        documents in random order and ends at 16 times the requested tokens, so that a small sample does not tokenise a
        large corpus. Raises Mistake if the length is too long for the model or for the corpus, and as `corpora.read`
        does.
        """
        from esparse.data import tokens

        render = tokens.chat_template(tokenizer, "calibration.chat") if self.chat else None
        corpus = corpora.read(self.corpus, "calibration", path=self.path, column=self.column, render=render)
        return self.sample_of(corpus, tokenizer, longest, family)

    def further(self, count: int) -> list[Calibration]:
        """The same, with other sequences: their seeds are far from those that a user counts up."""
        return [replace(self, seed=self.seed + FAR * (i + 1)) for i in range(count)]

    def sample_of(self, corpus: corpora.Corpus, tokenizer: Tokenizer, longest: int, family: str = "") -> Tensor:
        """`sample` for a text that was read already."""
        import torch

        from esparse.data import tokens

        length = sequence_length(self.length, longest, "calibration.length")
        begin = tokens.beginning(self.bos, tokenizer, family, "calibration.bos")
        if begin is not None and length < 2:
            raise Mistake(f"calibration.length={length} has room for the beginning token only: set it to 2 or more")
        count, generator = self.sequences, torch.Generator().manual_seed(self.seed)
        how: tokens.Drawn = {"count": count, "length": length, "generator": generator, "begin": begin}
        if corpus.apart:
            return tokens.random_crops(corpus, tokenizer, **how)
        if corpus.long is not None:
            return tokens.random_excerpts(corpus.long, tokenizer, **how)
        enough = None
        if len(corpus.texts) > 1:
            corpus, enough = tokens.in_random_order(corpus, generator), SPARE * count * length
        tokens_T = tokens.stream(corpus, tokenizer, at_most=enough)
        if len(tokens_T) < length:
            raise Mistake(
                f"the calibration corpus {corpus.name} has {len(tokens_T)} tokens, too few for one sequence of "
                f"{length}: use a longer text or set calibration.length lower"
            )
        if corpus.name == "builtin" and len(tokens_T) < count * length:
            raise Mistake(
                f"the built-in corpus has {len(tokens_T):,} tokens to calibrate on, fewer than the {count} x {length} "
                "that calibration.sequences and calibration.length ask for: ask for fewer, or give a longer text "
                "(calibration=text calibration.path=FILE)"
            )
        if len(tokens_T) < count * length:
            log.warning(
                "the calibration corpus %s has %s tokens, and %d sequences of %d are asked for: they overlap, so that "
                "parts of it count several times; use a longer text or fewer sequences",
                corpus.name,
                f"{len(tokens_T):,}",
                count,
                length,
            )
        return tokens.random_windows(tokens_T, **how)
