"""Settings that are lists of regular expressions, such as the names of layers that stay dense."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from esparse.errors import Mistake


def check(setting: str, expressions: Any) -> None:
    """Raises Mistake if the setting is no list of regular expressions."""
    if isinstance(expressions, str) or not isinstance(expressions, Sequence):
        raise Mistake(f"{setting} takes a list of regular expressions, got {expressions!r}")
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise Mistake(f"{setting} holds {expression!r}, which is no regular expression: {error}") from None


def check_found(setting: str, expressions: Sequence[str], names: Collection[str], such: str) -> None:
    """Raises Mistake for an expression that is found in none of the names inside a model's blocks; `such`: examples."""
    for expression in expressions:
        if not any(re.search(expression, name) for name in names):
            raise Mistake(
                f"{setting}: {expression!r} is found in no name inside the model's blocks, such as {such}: no layer "
                "would be skipped for it"
            )
