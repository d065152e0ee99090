"""Text into tokens: whole streams, consecutive windows, random windows, random crops of documents. Never any padding.

Shapes: T tokens of a stream, S sequences, W windows, L tokens of each; all tokens are int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esparse.data.corpora import Corpus
from esparse.errors import Mistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DEFAULT_LENGTH = 2048  # the literature's context; a model's own maximum can be 128k, which no calibration survives
DOCUMENTS_AT_ONCE = 16
STREAMS_KEPT = 8
_streams: dict[str, Tensor] = {}  # a sweep in one process tokenises each text once


def sequence_length(asked: int | None, longest: int, setting: str) -> int:
    """How many tokens a sequence has: as asked, else 2048 or the model's `longest`, whichever is less."""
    if asked is not None and asked > longest:
        raise Mistake(
            f"{setting}={asked} is longer than the {longest} tokens that the model takes: "
            f"set {setting} to at most {longest}, or to null for min({DEFAULT_LENGTH}, {longest})"
        )
    return min(longest, DEFAULT_LENGTH) if asked is None else asked


def stream(corpus: Corpus, tokenizer: Tokenizer, at_most: int | None = None) -> Tensor:
    """The whole corpus as one stream tokens_T, cut off at `at_most` tokens.

    A single text is tokenised in one piece, with the special tokens that the tokenizer gives it (a BOS stands at the
    very start and nowhere else). Of several documents each has the end-of-text token in front, as the built-in model
    learned it; where the tokenizer has none, they are joined by blank lines into a single text.
    """
    texts = corpus.texts
    if len(texts) > 1 and tokenizer.eos_token_id is None:
        texts = ["\n\n".join(texts)]
    key = _key(texts, tokenizer, at_most)
    if key in _streams:
        return _streams[key]
    tokens_T = _marked(texts, tokenizer, at_most) if len(texts) > 1 else _whole(texts[0], tokenizer)
    tokens_T = tokens_T[:at_most].clone()
    if key is not None:
        while len(_streams) >= STREAMS_KEPT:
            _streams.pop(next(iter(list(_streams))), None)  # another thread may have done so
        _streams[key] = tokens_T
    return tokens_T


def in_random_order(corpus: Corpus, generator: torch.Generator) -> Corpus:
    """The same documents in another order."""
    order = torch.randperm(len(corpus.texts), generator=generator).tolist()
    return replace(corpus, texts=[corpus.texts[i] for i in order])


def windows(tokens_T: Tensor, length: int) -> Tensor:
    """Consecutive windows_WL that do not overlap, from the first token on; the tail is dropped."""
    return tokens_T[: len(tokens_T) // length * length].view(-1, length).clone()  # not a view of a kept stream


def random_windows(tokens_T: Tensor, *, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Sequences tokens_SL from anywhere in the stream; they may overlap and, rarely, repeat."""
    starts_S1 = torch.randint(len(tokens_T) - length + 1, (count, 1), generator=generator)
    return tokens_T[starts_S1 + torch.arange(length)]


def random_crops(
    corpus: Corpus, tokenizer: Tokenizer, *, count: int, length: int, generator: torch.Generator
) -> Tensor:
    """Sequences tokens_SL, each from a random place in another random document of more than `length` tokens.

    Documents are tried in random order, each once. Raises ValueError where too few of them are long enough.
    """
    crops = []
    for indices in torch.randperm(len(corpus.texts), generator=generator).split(DOCUMENTS_AT_ONCE):
        texts = [corpus.texts[index] for index in indices.tolist()]
        # A document of no more bytes than tokens asked is not even tokenised: tokens stand for a byte or more.
        for ids in _ids([text for text in texts if len(text.encode()) > length], tokenizer):
            if len(ids) > length:
                start = int(torch.randint(len(ids) - length, (), generator=generator))
                crops.append(ids[start : start + length])
                if len(crops) == count:
                    return torch.tensor(crops, dtype=torch.long)
    raise Mistake(
        f"{count} sequences of {length} tokens were asked of the corpus {corpus.name}, but only {len(crops)} of its "
        f"{len(corpus.texts)} documents are longer: set calibration.sequences or calibration.length lower"
    )


def _whole(text: str, tokenizer: Tokenizer) -> Tensor:
    return torch.tensor(_ids([text], tokenizer)[0], dtype=torch.long)


def _marked(texts: Sequence[str], tokenizer: Tokenizer, at_most: int | None) -> Tensor:
    tokens: list[int] = []
    for first in range(0, len(texts), DOCUMENTS_AT_ONCE):
        for ids in _ids(texts[first : first + DOCUMENTS_AT_ONCE], tokenizer, add_special_tokens=False):
            tokens.append(tokenizer.eos_token_id)
            tokens += ids
        if at_most is not None and len(tokens) >= at_most:
            break
    return torch.tensor(tokens, dtype=torch.long)


def _ids(texts: Sequence[str], tokenizer: Tokenizer, *, add_special_tokens: bool = True) -> list[list[int]]:
    if not texts:
        return []
    # Not verbose: a stream is meant to be longer than the model's context, there is nothing to warn of.
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _key(texts: Sequence[str], tokenizer: Tokenizer, at_most: int | None) -> str | None:
    """A digest of all that the stream depends on; None for a tokenizer that can not be written down (a slow one)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = sha256(f"{at_most} {tokenizer.eos_token_id} {len(texts)} {backend.to_str()}".encode())
    for text in texts:
        digest.update(f" {len(text)} ".encode())
        digest.update(text.encode())
    return digest.hexdigest()
