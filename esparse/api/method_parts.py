"""Converts the arguments of esparse.prune to the parts of a method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from esparse.errors import Mistake
from esparse.parts import extras, numbers
from esparse.parts.plugins import BASES, class_name
from esparse.records.groups import GROUPS

NEUTRAL = {
    "shuffle": "none",
    "update": "none",
    "recovery": "none",
    "quantise": "none",
    "prepare": "none",
    "allocation": "uniform",
}
IMPLIED = (
    "implied"  # an update or a shuffle: that of the metric's paper (sparsegpt's sweep, entropy's esparse), or none
)


def option(group: str, name: str, /, **changes: Any) -> Any:
    """The part of this name on the command line, with the numbers of conf/, some of them changed.

    Example: `option("metric", "entropy", gamma=0.25)`. Raises ValueError, with similar names, for an unknown name or
    setting.
    """
    part, _ = numbers.option(group, name, class_of, changes, outside=numbers.usual())
    return part


def class_of(group: str, name: str) -> type:
    """The class of `/schema/GROUP/NAME` in conf/."""
    return GROUPS[group].component(name)


def parts_of(asked: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The objects of a method, and the name of each."""
    outside = numbers.usual() | {"seed": seed}
    parts, choices, implied = {}, {}, dict(NEUTRAL)
    for group, part in asked.items():  # the metric comes first, as it may imply a shuffle and an update
        if part is None and group in NEUTRAL:
            part = NEUTRAL[group]
        if part == IMPLIED:
            part = implied[group]
        if isinstance(part, str):
            parts[group], implies = numbers.option(group, part, class_of, outside=outside)
            implied |= implies
            choices[group] = part
            continue
        module, _, base = BASES[group].partition(":")
        if not isinstance(part, getattr(import_module(module), base)):
            raise Mistake(f"{group} must be the name of an option or an object of {module}.{base}, got {part!r}")
        parts[group], choices[group] = part, class_name(type(part))
        implied |= _implied_by(group, type(part))
    for part in parts.values():
        extras.need_part(part)
    return parts, choices


def _implied_by(group: str, component: type) -> dict[str, str]:
    """The options of other groups that the first option with this class implies; empty for the caller's own class."""
    names = [name for name in GROUPS[group].options if class_of(group, name) is component]
    return numbers.implied(group, names[0], class_of) if names else {}


def plain(value: Any) -> Any:
    """A part in the record's form: its class and settings."""
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        return settings | {"_class": class_name(type(value))}
    try:
        json.dumps(value)
    except TypeError:
        return {"_class": class_name(type(value))} if isinstance(value, object) else repr(value)
    return value
