"""The place of an export: what may be replaced there, and the hidden folder beside it in which an export is written.

Standard library only: it is looked at before torch is loaded.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from esparse.errors import Mistake

MARK = "esparse.json"  # written last; marks a folder as an export of esparse
WORKSHOP_MARK = "a-draft-of-esparse"  # marks a folder in which an export is written, and may be removed


def check_place(place: Path) -> None:
    """Raises Mistake if the place holds something that is no export of esparse, or if nothing can be written there."""
    if place.exists() and not (place / MARK).is_file() and (not place.is_dir() or any(place.iterdir())):
        raise Mistake(f"export.path={place} is there already, and is no export of esparse: name another folder")
    real = real_place(place)
    if Path.cwd().is_relative_to(real):
        raise Mistake(f"export.path={place} is the folder of this process, which an export would replace: name another")
    if os.path.ismount(real):
        raise Mistake(f"export.path={place} is a mounted disk, which no export can replace: name a folder on it")
    workshop = workshop_of(place)
    if os.path.lexists(workshop) and not is_workshop(workshop):
        raise Mistake(f"{workshop}, in which export.path={place} would be written, holds other files: move them away")
    nearest = next(parent for parent in real.parents if os.path.lexists(parent))
    check_writable(nearest, f"export.path={place}", name=workshop.name)


def check_writable(folder: Path, who: str, *, name: str = ".esparse-tries") -> None:
    """Raises Mistake if no folder with such a name can be made in this one."""
    if not folder.is_dir():
        raise Mistake(f"{who}: {folder} is no folder, so that nothing can be written there")
    try:  # permissions do not say it: they bind no root, and a disk may be mounted to be read only
        os.rmdir(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    except OSError as error:
        raise Mistake(f"{who}: nothing can be written to {folder} ({error.strerror})") from error


def real_place(place: Path) -> Path:
    """The folder itself, if the place is a link to it: what is moved and removed must not be the link."""
    return Path(os.path.realpath(place))


def workshop_of(place: Path) -> Path:
    """The hidden folder beside the place, on the same disk, in which its next export is written."""
    real = real_place(place)
    return real.with_name(f".{real.name}.esparse-part")


def is_workshop(folder: Path) -> bool:
    """Whether esparse made this folder, and nobody put anything else into it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    held = {path.name for path in folder.iterdir()}
    return not held or WORKSHOP_MARK in held <= {WORKSHOP_MARK, "new", "old"}
