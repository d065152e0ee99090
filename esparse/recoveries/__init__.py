"""Recoveries: what is done to a block after it was pruned, its keep masks held."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Recovery(ABC):  # noqa: B024 - what a recovery does is fixed with the first one that does something
    """Repairs a pruned block."""


@dataclass(kw_only=True, slots=True)
class NoRecovery(Recovery):
    """One-shot pruning: nothing is done."""
