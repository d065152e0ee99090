"""The texts of the running Python's standard library, by split: what the built-in model was trained on.

A document is one documentation topic of `pydoc_data.topics` or the source of one module (docstrings included). It is
held out if the hash of its name says so, hence every Python version has the same split, and documents come in the order
of that hash, hence the first ones are a fair mix of all kinds of text. The texts differ between Python versions.
make_corpus.py chooses the built-in corpus, which is one version's, by the same split.
"""

from __future__ import annotations

import contextlib
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

HELD_OUT_ONE_IN = 10
SPLITS = ("train", "held-out")
NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "lib-dynload", "__phello__", "pydoc_data"}
# Not prose or ordinary code: test data, tables, generated files.
SKIPPED = NOT_OF_THE_LIBRARY | {"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils"}
SKIPPED |= {"ensurepip", "encodings", "turtledemo"}


def documents(split: str) -> list[str]:
    """The texts of one split ("train" or "held-out"), in the order of the hash of their names."""
    return [text for name, text in in_order(every_document()) if split_of(name) == split]


def in_order(documents: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """Documents, each a name and a text, in the order of the hash of their names."""
    return sorted(documents, key=lambda document: digest(document[0]))


def split_of(name: str) -> str:
    return SPLITS[int.from_bytes(digest(name)[:8], "big") % HELD_OUT_ONE_IN == 0]


def digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def every_document(skipped: set[str] = SKIPPED) -> Iterator[tuple[str, str]]:
    """Name and text of every document, without files and folders of the names `skipped`."""
    with contextlib.suppress(ImportError):  # some distributions leave the topics out
        from pydoc_data.topics import topics

        for name, text in topics.items():
            yield f"topic {name}", text.strip() + "\n"
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).with_suffix("").parts
        if skipped.isdisjoint(parts):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            if text:
                yield f"module {'.'.join(parts)}", text + "\n"
