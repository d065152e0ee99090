"""Tokenizers and a Hugging Face cache small enough to compute with by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from esparse.data.corpora import HUB, Purpose

START, END = 256, 257


def byte_tokenizer(*, starts: bool = False, ends: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; `starts` puts <s> in front of each text, `ends` gives it an end-of-text token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<s>": START, "</s>": END}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if starts:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    names = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if ends else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **names)


def put(cache: Path, name: str, purpose: Purpose, texts: list[str]) -> Path:
    """Place a hub file of a corpus in the cache as the hub's client lays it out."""
    asked = HUB[name][purpose]
    home = cache / f"datasets--{asked.source.repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    ref = home / "refs" / asked.source.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    file = home / "snapshots" / commit / asked.source.file
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({asked.column: texts}), file)
    else:
        rows = "".join(json.dumps({"text": text, "url": "https://example.org"}) + "\n" for text in texts)
        file.write_bytes(gzip.compress(rows.encode()))
    return file
