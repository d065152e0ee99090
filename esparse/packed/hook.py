"""Registers esparse's packed format with transformers as soon as transformers is imported, and not before.

`import esparse` thus loads neither torch nor transformers, and works before or after `import transformers`. Standard
library only.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger("esparse")

WATCHED = "transformers.quantizers.auto"  # holds the table of formats; every from_pretrained imports it
REGISTERS = "esparse.packed.quantizer"


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, then registers the format."""

    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:  # for instance get_source, which tracebacks need
        return getattr(self._own, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)  # needed once, and the search below must not come back here
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register() -> None:
    """Registers the format; logs a warning if that fails, because `import transformers` must not fail for its sake."""
    try:
        importlib.import_module(REGISTERS)
    except Exception as error:
        log.warning(
            "transformers cannot load checkpoints that esparse packed, because esparse does not fit this version of it "
            "(%s: %s): install the version that esparse asks for",
            type(error).__name__,
            error,
        )


def install() -> None:
    """Registers the format now if transformers is imported already, else when it is imported."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
