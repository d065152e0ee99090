"""Finds the configuration: in the package (as a wheel has it), which in a checkout is a link to conf/."""

from __future__ import annotations

from pathlib import Path

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
