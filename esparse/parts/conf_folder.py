"""Finds the configuration: in the package (as a wheel has it), which in a checkout is a link to conf/."""

from __future__ import annotations

import os
from pathlib import Path

from esparse.errors import Mistake

PACKAGE = Path(__file__).parents[1]


def conf_folder() -> Path:
    """The folder with config.yaml and one folder of options per group.

    A checkout on a file system without links still has the folder conf/ beside the package.
    """
    inside = PACKAGE / "conf"
    return inside.resolve() if (inside / "config.yaml").is_file() else PACKAGE.parent / "conf"


def checkout() -> Path | None:
    """The root of the checkout that this code runs from; None if it was installed."""
    root = PACKAGE.parent
    return root if (root / "launch.py").is_file() and (root / "pyproject.toml").is_file() else None


def own_folder() -> Path | None:
    """The user's own folder of configuration: $ESPARSE_CONF, else ~/.config/esparse if it is there.

    Raises Mistake for a folder in ESPARSE_CONF that there is not.
    """
    if named := os.environ.get("ESPARSE_CONF"):
        folder = Path(named).expanduser().absolute()
        if not folder.is_dir():
            raise Mistake(f"ESPARSE_CONF={named}: there is no such folder")
        return folder
    root = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    try:
        folder = Path(root).expanduser() / "esparse"
    except RuntimeError:  # a user without a home
        return None
    return folder.absolute() if folder.is_dir() else None
