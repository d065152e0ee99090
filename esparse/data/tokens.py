"""Turns text into tokens: whole streams, consecutive windows, random windows, random crops of documents; no padding.

Shapes: T tokens of a stream, S sequences, W windows, L tokens of each; all tokens are int64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from esparse.data.corpora import Corpus
from esparse.data.text_files import LongText
from esparse.errors import Mistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DOCUMENTS_AT_ONCE = 16
log = logging.getLogger("esparse")

STREAMS_KEPT = 8
PER_TOKEN = 8  # characters read per token at first; a token has about 4 characters
SPARE_TOKENS = 64  # read beyond the requested tokens, because the last ones depend on where the text is cut
SAYS_NOTHING = 16  # from this number on, tokens that are all equal mean a wrong tokenizer
LONG, FEW = 256, 8  # a text of so many tokens has more different ones than this
UNKNOWN = 0.05  # share of a text's tokens
BEGIN = ("gemma",)  # parts of names of families that expect a beginning token in front of every sequence
_streams: dict[str, Tensor] = {}  # cache, so that a sweep in one process tokenises each text once


def stream(corpus: Corpus, tokenizer: Tokenizer, at_most: int | None = None) -> Tensor:
    """The whole corpus as one stream tokens_T, truncated to `at_most` tokens.

    A single text is tokenised in one piece, with the tokenizer's special tokens (BOS only at the very start). Each of
    several documents gets the end-of-text token in front, as the built-in model has learned it; if the tokenizer has no
    such token, blank lines join the documents to one text.
    """
    if corpus.long is not None:
        most = corpus.long.characters if at_most is None else PER_TOKEN * at_most
        return _beginning(corpus.long.start, most, tokenizer, at_most)[:at_most].clone()
    texts = corpus.texts
    if len(texts) > 1 and tokenizer.eos_token_id is None:
        texts = ["\n\n".join(texts)]
    key = _key(texts, tokenizer, at_most)
    if key in _streams:
        return _streams[key]
    if len(texts) > 1:
        tokens_T = _marked(texts, tokenizer, at_most)
    else:
        most = len(texts[0]) if at_most is None else PER_TOKEN * at_most
        tokens_T = _beginning(lambda characters: texts[0], most, tokenizer, at_most)
    tokens_T = tokens_T[:at_most].clone()
    if key is not None:
        while len(_streams) >= STREAMS_KEPT:
            _streams.pop(next(iter(list(_streams))), None)  # another thread may have removed it
        _streams[key] = tokens_T
    return tokens_T


def in_random_order(corpus: Corpus, generator: torch.Generator) -> Corpus:
    """The corpus with its documents in random order."""
    order = torch.randperm(len(corpus.texts), generator=generator).tolist()
    return replace(corpus, texts=[corpus.texts[i] for i in order])


def beginning(asked: str | bool, tokenizer: Tokenizer, family: str, setting: str) -> int | None:
    """The token in front of every sequence; None: no such token.

    `asked`: true, false, or auto (as the family expects). Gemma's models were trained with it in front of every
    sequence and need it: Gemma 3 with 270 million parameters has a perplexity of 39.7 with it and of 75.5 without. The
    literature measures all other models without it, and so does auto.
    """
    token = tokenizer.bos_token_id
    if asked is True and token is None:
        raise Mistake(f"{setting}=true asks for a beginning token, and the tokenizer has none: set {setting}=false")
    expected = any(name in family for name in BEGIN) and token is not None
    if asked == "auto" and not expected and token is not None and _ids(["a"], tokenizer)[0][:1] == [token]:
        log.info(
            "the tokenizer begins every text with its beginning token, but sequences have it only with %s=true", setting
        )
    return token if asked is True or (asked == "auto" and expected) else None


class Drawn(TypedDict):
    """How sequences are drawn."""

    count: int
    length: int
    generator: torch.Generator
    begin: int | None


def chat_template(tokenizer: Tokenizer, setting: str) -> Callable[[list[dict[str, Any]]], str]:
    """The function that turns a chat into text; raises Mistake if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise Mistake(f"{setting}=true asks for the tokenizer's chat template, and it has none: use a chat model's")
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))


def check_ids(name: str, tokens: Tensor, embedded: int) -> None:
    """Raises ValueError if a model that embeds so many tokens cannot read these, or if they say nothing."""
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= embedded:
        raise Mistake(
            f"the tokenizer gives {name} the token {largest}, and the model embeds {embedded} (0 to {embedded - 1}): "
            "it is another model's tokenizer, or one with tokens that the model was not resized for"
        )
    if tokens.numel() >= SAYS_NOTHING and bool((tokens == tokens.flatten()[0]).all()):
        raise Mistake(
            f"the tokenizer gives {name} the token {largest} again and again: its vocabulary does not fit the text, "
            "its files are missing, or the text is one word repeated"
        )


def warn_if_poor(name: str, tokens: Tensor, tokenizer: Tokenizer | None) -> None:
    """Logs a warning if much of a text is unknown to the tokenizer, or if it is the same few tokens again and again."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is not None and unknown is not None and unknown != tokenizer.eos_token_id and tokens.numel():
        share = float((tokens == unknown).double().mean())
        if share > UNKNOWN:
            log.warning(
                "%.0f %% of the tokens of %s are %s, which stands for what the tokenizer does not know: it is another "
                "model's tokenizer, or the text is in a script that it has no tokens for",
                100 * share,
                name,
                tokenizer.unk_token,
            )
    if tokens.numel() >= LONG and (different := len(tokens.unique())) < FEW:
        log.warning(
            "%s has %d different tokens among %s: it says next to nothing about language, so look at the text and at "
            "the tokenizer",
            name,
            different,
            f"{tokens.numel():,}",
        )


def windows(tokens_T: Tensor, length: int, begin: int | None = None) -> Tensor:
    """Consecutive windows_WL without overlap, from the first token on; drops the tail.

    `begin`: a token in front of each window, which counts as one of its L tokens.
    """
    own = length if begin is None else length - 1
    if begin is not None and len(tokens_T) and tokens_T[0] == begin:
        tokens_T = tokens_T[1:]  # removes the tokenizer's own beginning token
    windows_WL = tokens_T[: len(tokens_T) // own * own].view(-1, own)
    return windows_WL.clone() if begin is None else _begun(windows_WL, begin)  # a copy, not a view of the cached stream


def random_windows(
    tokens_T: Tensor, *, count: int, length: int, generator: torch.Generator, begin: int | None = None
) -> Tensor:
    """Sequences tokens_SL from random places in the stream; may overlap and, rarely, repeat. `begin`: see `windows`."""
    own = length if begin is None else length - 1
    starts_S1 = torch.randint(len(tokens_T) - own + 1, (count, 1), generator=generator)
    return _begun(tokens_T[starts_S1 + torch.arange(own)], begin)


def random_excerpts(
    text: LongText,
    tokenizer: Tokenizer,
    *,
    count: int,
    length: int,
    generator: torch.Generator,
    begin: int | None = None,
) -> Tensor:
    """Sequences tokens_SL from random places in a long text; tokenises nothing else of it.

    Places are drawn by character, and a sequence begins with the next word. Raises Mistake if the text has fewer tokens
    than a sequence.
    """
    own = length if begin is None else length - 1
    place_S = torch.rand(count, generator=generator, dtype=torch.float64)
    characters = PER_TOKEN * (own + SPARE_TOKENS)
    while True:
        span = min(characters, text.characters)
        starts = (place_S * (text.characters - span + 1)).long().tolist()
        excerpts = [_from_a_word(excerpt) for excerpt in text.excerpts(starts, span)]
        found: list[list[int]] = []
        for first in range(0, count, DOCUMENTS_AT_ONCE):
            found += _ids(excerpts[first : first + DOCUMENTS_AT_ONCE], tokenizer, add_special_tokens=False)
        if min(map(len, found)) >= own + (SPARE_TOKENS if span < text.characters else 0):
            return _begun(torch.tensor([ids[:own] for ids in found]), begin)
        if span == text.characters:
            raise Mistake(f"the text has too few tokens for one sequence of {length}: set calibration.length lower")
        characters *= 2


def _from_a_word(excerpt: str) -> str:
    """The excerpt from its first blank on; all of it if that is beyond the first quarter."""
    place = next((i for i, letter in enumerate(excerpt[: len(excerpt) // 4]) if letter.isspace()), 0)
    return excerpt[place:]


def _begun(tokens_SL: Tensor, begin: int | None) -> Tensor:
    return tokens_SL if begin is None else torch.cat([tokens_SL.new_full((len(tokens_SL), 1), begin), tokens_SL], 1)


def random_crops(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    count: int,
    length: int,
    generator: torch.Generator,
    begin: int | None = None,
) -> Tensor:
    """Sequences tokens_SL, each from a random place in a different random document of more than `length` tokens.

    Tries the documents in random order, each once. Raises Mistake if too few of them are long enough.
    """
    crops = []
    own = length if begin is None else length - 1
    for indices in torch.randperm(len(corpus.texts), generator=generator).split(DOCUMENTS_AT_ONCE):
        texts = [corpus.texts[index] for index in indices.tolist()]
        # Skips documents with no more bytes than `length`, because a token takes at least one byte.
        for ids in _ids([text for text in texts if len(text.encode()) > length], tokenizer):
            if len(ids) > length:
                start = int(torch.randint(len(ids) - length, (), generator=generator))
                crops.append(ids[start : start + own])
                if len(crops) == count:
                    return _begun(torch.tensor(crops, dtype=torch.long), begin)
    raise Mistake(
        f"{count} sequences of {length} tokens were asked of the corpus {corpus.name}, but only {len(crops)} of its "
        f"{len(corpus.texts)} documents are longer: set calibration.sequences or calibration.length lower"
    )


def _beginning(start: Callable[[int], str], characters: int, tokenizer: Tokenizer, at_most: int | None) -> Tensor:
    """The tokens of a text's beginning, at least `at_most` of them if it has as many; `start` gives its characters.

    They equal the whole text's tokens, because the tokenised part ends between two words, some tokens after the last.
    """
    while True:
        text = start(characters)
        is_whole = len(text) <= characters
        if not is_whole:
            cut = max(text.rfind("\n", characters // 2, characters), 0) or text.rfind(" ", characters // 2, characters)
            text = text[: cut if cut > 0 else characters]
        tokens_T = torch.tensor(_ids([text], tokenizer)[0], dtype=torch.long)
        if is_whole or at_most is None or len(tokens_T) >= at_most + SPARE_TOKENS:
            return tokens_T
        characters *= 4


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
    # Not verbose, because a stream may be longer than the model's context and needs no warning.
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
    """A digest of all that the stream depends on; None for a tokenizer that cannot be serialised (a slow one)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = sha256(f"{at_most} {tokenizer.eos_token_id} {len(texts)} {backend.to_str()}".encode())
    for text in texts:
        digest.update(f" {len(text)} ".encode())
        digest.update(text.encode())
    return digest.hexdigest()
