"""Configurations that Hydra composes in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir

from esparse.cli import registry
from esparse.cli.help_text import store_not_copied

CONF = Path(__file__).parent.parent / "conf"


@contextmanager
def composing(folder: Path = CONF) -> Iterator[None]:
    """Within it `hydra.compose` reads that folder, as quickly as in a call of launch.py."""
    registry.register()
    with store_not_copied(), initialize_config_dir(str(folder), version_base="1.3"):
        yield
