"""Tells transformers of esparse's format as soon as transformers itself is imported, and not before.

So `import esparse` loads neither torch nor transformers, in whatever order the two are imported. Standard library only.
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
    """Loads a module as its own loader does, and then the one that registers."""

    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:  # such as get_source, by which tracebacks find a module's lines
        return getattr(self._own, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)  # it comes once only, and the search below must not find us again
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register() -> None:
    """Whatever fails: `import transformers` works without esparse's format, and must not break for its sake."""
    try:
        importlib.import_module(REGISTERS)
    except Exception as error:
        log.warning(
            "transformers cannot load checkpoints that esparse packed, as esparse does not fit this version of it "
            "(%s: %s): install the version that esparse asks for",
            type(error).__name__,
            error,
        )


def install() -> None:
    """Registers the format now if transformers is there already, else once it comes."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
