"""Reads texts from files (.txt, .jsonl, .json, .parquet; .gz), with one clear sentence for each kind of wrong file."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

from esparse.data.chats import messages
from esparse.errors import Mistake

log = logging.getLogger("esparse")

CHATS = ("messages", "conversations")  # usual names of columns with chats
PIECE = 2**20  # characters that are read at a time
LONGEST_ROW = 2**28  # most characters of a row
GZIP = b"\x1f\x8b"
# How files begin that are no UTF-8 text: what they are, and what to do.
SIGNS = {
    GZIP: "is packed by gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "is packed by zstandard: unpack it (zstd -d)",
    b"\xfd7zXZ": "is packed by xz: unpack it (xz -d)",
    b"BZh": "is packed by bzip2: unpack it (bzip2 -d)",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"PAR1": "is a parquet file: let its name end in .parquet",
    b"%PDF": "is a PDF: give its text (pdftotext)",
    b"\xff\xfe": "is UTF-16 text: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16 text: convert it (iconv -f UTF-16 -t UTF-8)",
}
NULS = 0.1  # share of characters: more of them are in no text


def texts_of(path: Path, column: str, *, first: int | None = None) -> list[str]:
    """The texts of a file in order: one for .txt, one per row (from `column`) for the others.

    `first`: number of rows to read. Raises FileNotFoundError if there is no such file and Mistake if it is of another
    kind, is damaged, is not UTF-8, lacks the column or has a row without text.
    """
    rows = Rows(path, column)
    values = rows.values() if rows.by_row else iter([(1, "".join(rows.pieces()))])
    with rows.explained():
        return [rows.text(number, value) for number, value in islice(values, first)]


COLUMN = "text"  # as conf/ has it: of a file without columns it says nothing


@dataclass(slots=True)
class Rows:
    """The rows of a text file, which can be iterated repeatedly and are never all in memory.

    `render`: turns a chat (a list of messages) into text, if chats are wanted. `group`: the settings' group on the
    command line, for error messages.
    """

    path: Path
    column: str
    group: str = "calibration"
    render: Callable[[list[dict[str, Any]]], str] | None = None
    _said: int = field(default=0, init=False)  # rows without text that the log has reported
    _read: Callable[[Rows], Iterator[tuple[int, Any]]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        path = self.path = self.path.expanduser()
        if not path.exists():
            raise FileNotFoundError(f"expected a text file at {path.absolute()}, found nothing there: check the path")
        if path.is_dir():
            raise Mistake(f"expected a text file at {path.absolute()}, found a folder: name one file in it")
        kind = next((suffix for suffix in ENDINGS if path.name.lower().endswith(suffix)), None)
        if kind is None:
            raise Mistake(
                f"expected a file that ends in one of {', '.join(ENDINGS)}, got {path.name}: convert or rename it"
            )
        if path.is_file() and path.stat().st_size == 0:
            raise Mistake(f"expected text in {path.absolute()}, found an empty file: name another one")
        self._read = _READERS.get(kind)
        if self.column != COLUMN and self._read is None:
            raise Mistake(
                f"{self.group}.column={self.column} names a column of {', '.join(_READERS)}, and {path.name} has none: "
                "leave it out"
            )
        if self.render is not None and self._read is None:
            raise Mistake(
                f"{self.group}.chat=true renders the rows of {', '.join(_READERS)}, and {path.name} has no rows: leave "
                "it out"
            )

    @property
    def by_row(self) -> bool:
        """Whether the file has rows; a .txt file has none."""
        return self._read is not None

    def values(self) -> Iterator[tuple[int, Any]]:
        """The number and the value of every row."""
        assert self._read is not None
        return self._read(self)

    def check(self) -> None:
        """Raises as `pieces` does if the first row, or the first piece of a .txt file, shows it; reads no further."""
        if not self.by_row:
            next(self.pieces(), None)
            return
        with self.explained():
            for number, value in self.values():
                if not _is_empty(value):
                    self.text(number, value)
                    return

    def pieces(self) -> Iterator[str]:
        """Yields the text of the file in pieces of about PIECE characters; rows are joined by blank lines.

        Skips rows without text, and logs their number. Raises as `texts_of` does.
        """
        with self.explained():
            if not self.by_row:
                with self.path.open(encoding="utf-8-sig") as file:
                    while piece := file.read(PIECE):
                        if piece.count("\0") > NULS * len(piece):
                            raise Mistake(
                                f"{self.path} holds NUL characters: it is UTF-16 text, which has to be converted "
                                "(iconv -f UTF-16LE -t UTF-8), or no text"
                            )
                        yield piece
                return
            skipped, held, size, is_first = 0, [], 0, True
            try:
                for number, value in self.values():
                    if _is_empty(value):
                        skipped += 1
                        continue
                    text = self.text(number, value)
                    held.append(text if is_first else f"\n\n{text}")
                    is_first = False
                    size += len(held[-1])
                    if size >= PIECE:
                        yield "".join(held)
                        held, size = [], 0
                if held:
                    yield "".join(held)
            finally:
                if skipped > self._said:
                    self._said = skipped
                    log.warning("%s: %d rows without text are skipped", self.path, skipped)

    def text(self, number: int, value: Any) -> str:
        """The text of one row; raises Mistake if it is no text."""
        if self.render is not None:
            try:
                value = messages(value)
            except Mistake as cause:
                raise Mistake(f"{self.path}, row {number}: {cause}") from cause
            try:
                value = self.render(value)
            except Exception as cause:  # templates raise many types
                raise Mistake(
                    f"{self.path}, row {number}: the tokenizer's chat template does not take this chat ({cause})"
                ) from cause
        if not isinstance(value, str):
            kind = type(value).__name__
            hint = ""
            if isinstance(value, list) and all(isinstance(one, dict) for one in value):
                hint = f": set {self.group}.chat=true to render chats"
            elif isinstance(value, list):
                hint = ": a row is one text, so join its parts"
            raise Mistake(
                f"{self.path}, row {number}: expected text in column {self.column!r}, got a value of type {kind}{hint}"
            )
        try:
            value.encode()
        except UnicodeEncodeError as cause:  # JSON can spell half a character: "\\ud800"
            raise Mistake(
                f"{self.path}, row {number}: the text holds half a surrogate pair: repair or drop the row"
            ) from cause
        return value

    def cell(self, where: str, row: dict[str, Any]) -> Any:
        """The value of the wanted column; `where`: the row, for the error message."""
        return row[self.name(where, list(row))]

    def name(self, where: str, columns: list[str]) -> str:
        """The column to read among those in `there`; raises Mistake if it is missing."""
        if self.column in columns:
            return self.column
        chats = [name for name in CHATS if name in columns]
        if self.render is not None and chats and self.column == "text":
            return chats[0]
        hint = f", or {self.group}.chat=true to render chats" if chats and self.render is None else ""
        raise Mistake(
            f"{where}: expected a column {self.column!r}, found {', '.join(map(repr, columns)) or 'none'}; set "
            f"{self.group}.column=NAME{hint}"
        )

    def explained(self) -> _Explained:
        return _Explained(self.path)


@dataclass(frozen=True)
class LongText:
    """A text that is too long for memory: gives its beginning, and excerpts from anywhere in it."""

    rows: Rows

    @cached_property
    def characters(self) -> int:
        return sum(map(len, self.rows.pieces()))

    def start(self, characters: int) -> str:
        """At least this many characters from the beginning, if the text has as many."""
        held, size = [], 0
        for piece in self.rows.pieces():
            held.append(piece)
            size += len(piece)
            if size >= characters:
                break
        return "".join(held)

    def excerpts(self, starts: list[int], characters: int) -> list[str]:
        """Excerpts of this many characters from each start."""
        found: list[list[str]] = [[] for _ in starts]
        begin, last = 0, max(starts, default=0) + characters
        for piece in self.rows.pieces():
            end = begin + len(piece)
            for parts, start in zip(found, starts, strict=True):
                if start < end and start + characters > begin:
                    parts.append(piece[max(0, start - begin) : start + characters - begin])
            begin = end
            if begin >= last:
                break
        return ["".join(parts) for parts in found]


def _is_empty(value: Any) -> bool:
    """Whether a row has no text."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


class _Explained:
    """A context manager that turns readers' exceptions into a sentence with the file's name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, at: Any) -> None:
        if isinstance(error, UnicodeDecodeError) and (what := _other_kind(self.path)):
            raise Mistake(f"{self.path} {what}") from error
        if isinstance(error, UnicodeDecodeError):
            raise Mistake(
                f"{self.path} is not UTF-8 text{_first_wrong_line(self.path)}: convert it, for instance with iconv "
                "(iconv -f LATIN1 -t UTF-8, if that is what it is)"
            ) from error
        if isinstance(error, gzip.BadGzipFile) and not _begins_as_gzip(self.path):
            raise Mistake(
                f"{self.path} is not packed by gzip, as its name says: if it is text, call it {self.path.name[:-3]}"
            ) from error
        if isinstance(error, gzip.BadGzipFile | EOFError | zlib.error):
            raise Mistake(
                f"{self.path} can not be unpacked ({error}): it is damaged or not whole, copy it again"
            ) from error


def _begins_as_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP


def _other_kind(path: Path) -> str:
    """What a file is that is no UTF-8 text, and what to do; empty if its beginning does not tell."""
    opened: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rb") as file:
        begin = file.read(max(map(len, SIGNS)))
    said = next((said for sign, said in SIGNS.items() if begin.startswith(sign)), "")
    or_name = f", or name it {path.name}.gz" if "gzip" in said and path.suffix.lower() != ".txt" else ""
    return said + or_name


def _first_wrong_line(path: Path) -> str:
    """Where a text file stops being UTF-8, in words; empty if it is packed."""
    if path.name.lower().endswith(".gz"):
        return ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f" (line {number}, byte {error.start + 1}: 0x{line[error.start]:02x})"
    return ""


def _json(rows: Rows) -> Iterator[tuple[int, Any]]:
    """Reads JSON lines, or one array of rows."""
    path = rows.path
    opened: Callable[..., IO[str]] = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        begin = file.read(PIECE)
        if begin.lstrip().startswith("["):
            yield from _array(rows, file, begin)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _field(rows, number, line.removeprefix("\ufeff"))


def _field(rows: Rows, number: int, line: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as cause:
        raise Mistake(f"{rows.path}, line {number}: expected one JSON object a line, but {cause}") from cause
    except (RecursionError, ValueError) as cause:
        raise Mistake(f"{rows.path}, line {number}: {_too_much(cause)}") from cause
    if not isinstance(row, dict):
        hint = f': write {{"{rows.column}": ...}}' if isinstance(row, str) else ""
        raise Mistake(f"{rows.path}, line {number}: expected one JSON object a line, got a {type(row).__name__}{hint}")
    return rows.cell(f"{rows.path}, line {number}", row)


def _array(rows: Rows, file: IO[str], held: str) -> Iterator[tuple[int, Any]]:
    """Reads the rows of one JSON array (objects or texts) one at a time."""
    decoder, number, place = json.JSONDecoder(), 0, held.index("[") + 1
    while True:
        while place < len(held) and held[place] in " \t\r\n,":
            place += 1
        if held[place : place + 1] == "]":
            if (held[place + 1 :] + file.read(PIECE)).strip():
                raise Mistake(f"{rows.path}: expected one JSON array, or one JSON object a line, and found more")
            return
        try:
            row, end = decoder.raw_decode(held, place)
        except json.JSONDecodeError as cause:
            more = file.read(max(PIECE, len(held) - place))
            if not more or len(held) - place > LONGEST_ROW:
                raise Mistake(
                    f"{rows.path}, row {number + 1}: expected a JSON array of rows, but {cause.msg}"
                ) from cause
            held, place = held[place:] + more, 0
            continue
        except (RecursionError, ValueError) as cause:
            raise Mistake(f"{rows.path}, row {number + 1}: {_too_much(cause)}") from cause
        number, place = number + 1, end
        if place > PIECE:
            held, place = held[place:], 0
        if isinstance(row, dict):
            yield number, rows.cell(f"{rows.path}, row {number}", row)
        elif isinstance(row, str) or row is None:
            yield number, row
        else:
            raise Mistake(f"{rows.path}, row {number}: expected an object or a text, got a {type(row).__name__}")


def _too_much(cause: Exception) -> str:
    """What of a row is JSON, and more than Python's reader takes."""
    what = "lists or objects are nested too deeply" if isinstance(cause, RecursionError) else "a number is too long"
    return f"{what} to be read ({cause}): repair or drop the row"


def _parquet(rows: Rows) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(rows.path) as file:
            name = rows.name(str(rows.path), file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[name]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, value
    except pyarrow.ArrowException as cause:
        reason = str(cause).strip().splitlines()[0]
        raise Mistake(f"{rows.path} can not be read as parquet ({reason})") from cause


_READERS: dict[str, Callable[[Rows], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json,
    ".jsonl.gz": _json,
    ".json": _json,  # C4's JSON lines end in .json
    ".json.gz": _json,
    ".parquet": _parquet,
}
ENDINGS = (".txt", *_READERS)  # of files that are read
