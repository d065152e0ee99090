"""Compares the files of a packed checkpoint with the checksums in its config.json. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path

from esparse.errors import Mistake


def check_files(files: Sequence[Path], checksums: Mapping[str, str]) -> None:
    """Raises Mistake with the name of the first file whose checksum is wrong or missing."""
    for file in files:
        expected = checksums.get(file.name)
        if expected is None:
            raise Mistake(f"{file} is no part of this packed checkpoint: its config.json does not name it")
        if checksum(file) != expected:
            size = file.stat().st_size
            raise Mistake(
                f"{file} is damaged or cut short: its {size:,} bytes do not have the SHA-256 that config.json names; "
                "copy it again"
            )


def checksum(file: Path) -> str:
    """The SHA-256 of a file in hex digits."""
    with file.open("rb") as read:
        return file_digest(read, "sha256").hexdigest()
