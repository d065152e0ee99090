"""Gets tokens from an argument of esparse.prune: a corpus, a file, texts, or tokens.

Shapes: S sequences, W windows, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esparse.api.method_parts import option
from esparse.data import corpora
from esparse.data.calibration import Calibration
from esparse.data.corpora import Corpus
from esparse.data.tokens import check_ids, warn_if_poor
from esparse.data.windows import Perplexity
from esparse.errors import Mistake
from esparse.models.load import longest_sequence
from esparse.parts import extras, numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


SAID = 60  # characters of an argument in a message


def calibration_tokens(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    asked: Any,
    *,
    sequences: int | None,
    length: int | None,
    seed: int,
    further: int,
) -> list[Tensor]:
    """The calibration tokens and, of a text, `further` other samples of it."""
    if isinstance(asked, Tensor):
        if sequences is not None or length is not None:
            raise Mistake("sequences and length are for texts, and calibration is tokens already: leave them out")
        tokens_SL = _checked_tokens(model, asked, "calibration", least=1)
        warn_if_poor("the calibration", tokens_SL, tokenizer)
        return [tokens_SL]
    changes = {k: v for k, v in {"sequences": sequences, "length": length, "seed": seed}.items() if v is not None}
    text, part = _text("calibration", asked, changes)
    _check_tokenizer(tokenizer, "a text is calibrated on through a tokenizer: give one, or tokens (sequences x length)")
    how = (tokenizer, longest_sequence(model), model.config.model_type)
    parts = (part, *part.further(further))
    samples = [one.sample(*how) if text is None else one.sample_of(text, *how) for one in parts]
    check_ids("the calibration text", torch.cat(samples), model.get_input_embeddings().num_embeddings)
    warn_if_poor("the calibration text", samples[0], tokenizer)
    return [_checked_tokens(model, tokens_SL, "calibration", least=1) for tokens_SL in samples]


def windows(
    model: PreTrainedModel, tokenizer: Tokenizer | None, asked: Any, *, length: int | None, max_tokens: int | None
) -> Tensor:
    if isinstance(asked, Tensor):
        if length is not None or max_tokens is not None:
            raise Mistake("length and max_tokens are for texts, and text is windows of tokens already: leave them out")
        return _checked_tokens(model, asked, "text", least=2)
    changes = {k: v for k, v in {"length": length, "max_tokens": max_tokens}.items() if v is not None}
    text, part = _text("evaluate", asked, changes)
    _check_tokenizer(
        tokenizer, "a text is measured through a tokenizer: give one, or windows of tokens (windows x length)"
    )
    how = (tokenizer, longest_sequence(model), model.config.model_type)
    if text is not None:
        windows_WL = part.windows_of(text, *how)
    elif len(part.corpora) == 1:
        windows_WL = part.windows(part.corpora[0], *how)
    else:
        raise Mistake(f"one text is measured at a time, and {asked!r} has {len(part.corpora)}")
    check_ids("the text", windows_WL, model.get_input_embeddings().num_embeddings)
    warn_if_poor("the text", windows_WL, tokenizer)
    return _checked_tokens(model, windows_WL, "text", least=2)


def _check_tokenizer(tokenizer: Any, without: str) -> None:
    """Raises Mistake for None, with this sentence, and for what is no tokenizer, such as the name of one."""
    if tokenizer is None:
        raise Mistake(without)
    if not callable(tokenizer) or not all(hasattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")):
        inside = ", which has one: give its .tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        raise Mistake(
            "tokenizer must be a tokenizer of transformers (AutoTokenizer.from_pretrained), got "
            f"{_short(tokenizer)}{inside}"
        )


def _text(group: str, asked: Any, changes: dict[str, Any]) -> tuple[Corpus | None, Any]:
    """The text if it is given (else None: the part reads it), and the part that cuts tokens out of it."""
    if not isinstance(asked, str | Path | Sequence):
        wanted = Calibration if group == "calibration" else Perplexity
        if not isinstance(asked, wanted):  # a part with settings of its own
            raise Mistake(
                f"a corpus, a file, a list of texts, tokens (a torch tensor) or a {wanted.__name__} was expected, got "
                f"{_short(asked)}"
            )
        return None, asked
    if isinstance(asked, Path) or (isinstance(asked, str) and asked not in numbers.names(group)):
        if not (isinstance(asked, Path) or _names_a_file(asked)):
            near = numbers.near(asked, corpora.NAMES)
            near += "" if near.endswith("?") else "."
            raise Mistake(f"{_short(asked)} is neither a corpus nor a file{near} A text itself comes in a list: [text]")
        return None, option(group, "text", path=str(Path(asked).expanduser()), **changes)
    if isinstance(asked, str):
        if asked in extras.CORPORA:
            extras.need(extras.CORPORA[asked], f"the corpus {asked}")
        return None, option(group, asked, **changes)
    texts = list(asked)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Mistake(f"texts must be a list of strings, and tokens a torch tensor, got {_short(asked)}")
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Mistake(f"text {number} holds half of a surrogate pair, which is no character") from None
    # The option `builtin` cuts a stream of documents, and these are documents.
    return Corpus(name="given as texts", texts=texts), option(group, "builtin", **changes)


def _short(asked: Any) -> str:
    said = " ".join(repr(asked).split())
    return said if len(said) <= SAID else f"{said[:SAID]}... ({type(asked).__name__})"


def _names_a_file(text: str) -> bool:
    """Whether a file has this name, or one could: a word that ends like a file."""
    try:
        return Path(text).expanduser().is_file() or re.fullmatch(r"\.\w+", Path(text).suffix) is not None
    except OSError:  # too long for a name
        return False


def _checked_tokens(model: PreTrainedModel, tokens_SL: Tensor, what: str, *, least: int) -> Tensor:
    if tokens_SL.ndim != 2 or tokens_SL.shape[1] < least or not len(tokens_SL) or _is_no_integer(tokens_SL):
        long = "" if least == 1 else f", of {least} tokens or more"
        raise Mistake(
            f"tokens must be integers of sequences x length{long}, got {tokens_SL.dtype} of shape "
            f"{list(tokens_SL.shape)}"
        )
    if tokens_SL.is_meta:
        raise Mistake(f"{what} is on the device meta, where tensors have no values")
    known, tokens_SL = model.get_input_embeddings().num_embeddings, tokens_SL.detach().cpu().long().clone()
    lowest, highest = int(tokens_SL.min()), int(tokens_SL.max())
    if lowest < 0 or highest >= known:
        raise Mistake(f"{what} has the token {lowest if lowest < 0 else highest}, and the model knows 0 to {known - 1}")
    if tokens_SL.shape[1] > longest_sequence(model):
        raise Mistake(
            f"{what} has sequences of {tokens_SL.shape[1]} tokens, and the model takes {longest_sequence(model)}"
        )
    return tokens_SL


def _is_no_integer(tokens: Tensor) -> bool:
    return tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool


def in_words(asked: Any, tokens_SL: Tensor, seed: int) -> dict[str, Any]:
    """The description of the calibration for records and model cards."""
    is_text = isinstance(asked, str | Path)
    corpus = str(asked) if is_text else getattr(asked, "corpus", None)
    return {
        "corpus": corpus or ("texts" if isinstance(asked, Sequence) else "tokens"),
        "sequences": len(tokens_SL),
        "length": tokens_SL.shape[1],
        "seed": getattr(asked, "seed", seed),
    }
