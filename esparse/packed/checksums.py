"""Compares a packed checkpoint with the checksums in its config.json: its files, and what config.json says of them.

Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

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


def digest(entry: Mapping[str, Any]) -> str:
    """The SHA-256 of the entry `quantization_config`, but for its own `digest`, in whatever order its keys stand."""
    others = {key: value for key, value in entry.items() if key != "digest"}
    return sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
