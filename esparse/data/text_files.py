"""Texts in files (.txt, .jsonl, .parquet), with one clear sentence for each way that a file can be wrong."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from esparse.errors import Mistake


def texts_of(path: Path, column: str, *, first: int | None = None) -> list[str]:
    """The texts of a file in their order: one for .txt, one a row (of field `column`) for the others.

    With `first` only so many rows are read. Raises FileNotFoundError where there is no such file and ValueError where
    it is of another kind, is damaged, is not UTF-8 or lacks the column.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a text file at {path.absolute()}, found nothing there: check the path")
    if path.is_dir():
        raise Mistake(f"expected a text file at {path.absolute()}, found a folder: name one file in it")
    kind = next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), None)
    if kind is None:
        known = ", ".join(_READERS)
        raise Mistake(f"expected a file that ends in one of {known}, got {path.name}: convert or rename it")
    try:
        return list(islice(_READERS[kind](path, column), first))
    except UnicodeDecodeError as cause:
        raise Mistake(
            f"{path} is not UTF-8 text (byte {cause.start} of what was being read): convert it, for instance with iconv"
        ) from cause
    except (gzip.BadGzipFile, EOFError, zlib.error) as cause:
        raise Mistake(f"{path} can not be unpacked ({cause}): it is damaged or not whole, copy it again") from cause


def _whole(path: Path, column: str) -> Iterator[str]:
    yield path.read_text(encoding="utf-8-sig")


def _json_lines(path: Path, column: str) -> Iterator[str]:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _field(path, column, number, line)


def _field(path: Path, column: str, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as cause:
        raise Mistake(f"{path}, line {number}: expected one JSON object a line, but {cause}") from cause
    if not isinstance(row, dict):
        raise Mistake(f"{path}, line {number}: expected one JSON object a line, got a {type(row).__name__}")
    if column not in row:
        raise Mistake(_no_column(f"{path}, line {number}", column, list(row)))
    return _text(row[column], path, column, number)


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise Mistake(_no_column(str(path), column, file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text(value, path, column, number)
    except pyarrow.ArrowException as cause:
        raise Mistake(f"{path} can not be read as parquet ({str(cause).strip().splitlines()[0]})") from cause


def _text(value: object, path: Path, column: str, number: int) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise Mistake(f"{path}, row {number}: expected text in column {column!r}, got a value of type {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as cause:  # JSON can spell half a character: "\\ud800"
        raise Mistake(f"{path}, row {number}: the text holds half a surrogate pair: repair or drop the row") from cause
    return value


def _no_column(where: str, column: str, there: list[str]) -> str:
    return f"{where}: expected a column {column!r}, found {', '.join(map(repr, there)) or 'none'}; set column=NAME"


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _whole,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_lines,  # as C4 calls its JSON lines
    ".json.gz": _json_lines,
    ".parquet": _parquet,
}
