"""The built-in corpus: text that every CPython installation carries, so that a run needs no download.

A document is one documentation topic of `pydoc_data.topics` or the source of one module of the standard library
(docstrings included). A document is held out when the hash of its name says so, hence every Python version has the
same split, and documents come in the order of that hash, hence the first tokens are a fair mix of all kinds of text.
The text itself differs between Python versions: perplexities on it are comparable within one version only.
"""

from __future__ import annotations

import contextlib
import functools
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from esparse.errors import Mistake

HELD_OUT_ONE_IN = 10
# Not prose or ordinary code: installed packages, test data, tables, generated files, and the topics' own source.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "distutils"}
SKIPPED |= {"ensurepip", "encodings", "pydoc_data", "turtledemo", "lib-dynload", "__phello__"}
SPLITS = ("train", "held-out")


def documents(split: str) -> list[str]:
    """The texts of one split ("train" or "held-out"), in the order of the hash of their names.

    Raises ValueError for an unknown split and FileNotFoundError where this Python carries no source files.
    """
    if split not in SPLITS:
        raise Mistake(f"the built-in corpus has the splits {' and '.join(SPLITS)}, got {split!r}")
    named = sorted(_all_documents(), key=lambda document: _digest(document[0]))
    texts = [text for name, text in named if _is_held_out(name) == (split == "held-out")]
    if not texts:
        raise FileNotFoundError(
            f"this Python ({sysconfig.get_paths()['stdlib']}) carries no standard-library source to read; "
            "name a text of your own: calibration=text calibration.path=FILE evaluate=text evaluate.path=FILE"
        )
    return texts


def _digest(name: str) -> bytes:
    return sha256(name.encode()).digest()


def _is_held_out(name: str) -> bool:
    return int.from_bytes(_digest(name)[:8], "big") % HELD_OUT_ONE_IN == 0


@functools.cache  # thousands of files, which both splits of every run of a sweep are taken from
def _all_documents() -> tuple[tuple[str, str], ...]:
    return tuple(_read_documents())


def _read_documents() -> Iterator[tuple[str, str]]:
    with contextlib.suppress(ImportError):  # some distributions leave the topics out
        from pydoc_data.topics import topics

        for name, text in topics.items():
            yield f"topic {name}", text.strip() + "\n"
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            if text:
                yield f"module {'.'.join(parts)}", text + "\n"
