"""Builds parts by name, with the numbers of conf/, for callers from Python; needs no Hydra.

An option's YAML file begins with a `defaults` list in Hydra's syntax. This module reads the forms that esparse's
options use: the class (`/schema/metric/entropy@_here_`), another option of the same group (`gradient`), an option as
the value of a setting (`/update@first: swap`), and an option implied for another group (`override
/update@_global_.update: sparsegpt`).
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from esparse.errors import Mistake
from esparse.parts import plugins
from esparse.parts.conf_folder import conf_folder

Classes = Callable[[str, str], type]  # (group, name) -> the class of `/schema/GROUP/NAME`


@dataclass(slots=True)
class Settings:
    """The contents of an option's files: the class, its settings, and the options that it implies for other groups."""

    component: type | None = None
    values: dict[str, Any] = field(default_factory=dict)
    implied: dict[str, str] = field(default_factory=dict)


def names(group: str) -> list[str]:
    """All options of a group, including those of plug-ins. Raises Mistake for an unknown group."""
    if not isinstance(group, str):
        raise Mistake(f"a group is named by a text, got {group!r}")
    folder = conf_folder() / group
    if not folder.is_dir() or group == "hydra":
        known = [path.name for path in conf_folder().iterdir() if path.is_dir() and path.name != "hydra"]
        raise Mistake(f"there is no group {group!r}{near(group, known)}")
    return sorted({path.stem for path in folder.glob("*.yaml")} | set(plugins.of(group)))


def option(
    group: str, name: str, classes: Classes, changes: Mapping[str, Any] | None = None, *, outside: Mapping[str, Any]
) -> tuple[Any, dict[str, str]]:
    """The part of an option, with some settings changed, and the options that it implies, by group.

    `outside`: values to which its files may refer, such as ${seed}. Raises Mistake for an unknown option or setting, a
    value of the wrong type, or a setting without a value.
    """
    found = settings_of(group, name, classes)
    _merge(found.values, changes or {}, classes)
    return _built(group, name, found, outside), found.implied


def implied(group: str, name: str, classes: Classes) -> dict[str, str]:
    """The options of other groups that an option implies, by group; empty for an option without a file."""
    return settings_of(group, name, classes).implied if name in names(group) else {}


def usual() -> dict[str, Any]:
    """The defaults in conf/config.yaml: each group's option, and the plain values."""
    content = _read(conf_folder() / "config.yaml")
    chosen = {k: v for entry in content.pop("defaults") if isinstance(entry, dict) for k, v in entry.items()}
    return {k: v for k, v in chosen.items() if " " not in k} | {k: v for k, v in content.items() if k != "hydra"}


def near(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: similar known words, or all."""
    known = sorted(known)
    likely = alike(word, known)
    return f": did you mean {' or '.join(likely)}?" if likely else f"; there is {', '.join(known) or 'none'}"


def alike(word: str, known: Iterable[str]) -> list[str]:
    """The word itself but for capitals, else up to three known words that are similar, the most similar first."""
    by_small = {one.lower(): one for one in known}
    if (same := by_small.get(word.lower())) is not None:
        return [same]
    close = get_close_matches(word.lower(), by_small, n=3, cutoff=0.6)
    beginnings = [small for small in close if re.match(rf"{re.escape(small)}\b", word.lower())]
    # What the word begins with was meant: a100-80 is a100 and something, not a100-40gb.
    return [by_small[small] for small in sorted(close, key=lambda small: small not in beginnings)]


def settings_of(group: str, name: str, classes: Classes) -> Settings:
    """The contents of an option's files. Raises Mistake for an unknown option."""
    if not isinstance(name, str):
        raise Mistake(f"an option of {group} is named by a text, got {name!r}")
    if name not in names(group):
        raise Mistake(f"there is no {group} {name!r}{near(name, names(group))}")
    if (plugin := plugins.of(group).get(name)) is not None:
        return Settings(plugin, plugins.numbers(plugin, name))
    content = _read(conf_folder() / group / f"{name}.yaml")
    found = Settings()
    for entry in content.pop("defaults", []):
        if entry == "_self_":
            _merge(found.values, content, classes)
        elif isinstance(entry, str) and (schema := re.fullmatch(r"/schema/(\w+)/(\w+)@_here_", entry)):
            found.component = classes(schema[1], schema[2])
        elif isinstance(entry, str) and re.fullmatch(r"[\w.-]+", entry):
            base = settings_of(group, entry, classes)
            found.component = base.component
            found.implied |= base.implied
            _merge(found.values, base.values, classes)
        elif isinstance(entry, dict):
            (where, other), *_ = entry.items()
            if inside := re.fullmatch(r"/(\w+)@(\w+)", where):
                found.values[inside[2]] = Nested(inside[1], other, settings_of(inside[1], other, classes))
            elif implied := re.fullmatch(r"override /(\w+)@_global_\.\1", where):
                found.implied[implied[1]] = other
            else:
                raise Mistake(f"conf/{group}/{name}.yaml has an entry that only Hydra reads: {entry}")
        else:
            raise Mistake(f"conf/{group}/{name}.yaml has an entry that only Hydra reads: {entry}")
    return found


@dataclass(slots=True)
class Nested:
    """An option that is the value of another part's setting."""

    group: str
    name: str
    settings: Settings


def _merge(into: dict[str, Any], other: Mapping[str, Any], classes: Classes) -> None:
    for key, value in other.items():
        part = into.get(key)
        if isinstance(part, Nested) and isinstance(value, Mapping):
            _merge(part.settings.values, value, classes)
        elif isinstance(part, Nested) and isinstance(value, str):  # another option in its place
            into[key] = Nested(part.group, value, settings_of(part.group, value, classes))
        else:
            into[key] = value


def _built(group: str, name: str, found: Settings, outside: Mapping[str, Any]) -> Any:
    component = found.component
    assert component is not None, f"conf/{group}/{name}.yaml names no class"
    known = {field.name: field for field in dataclasses.fields(component) if field.init}
    values = found.values
    for setting in values:
        if setting not in known:
            raise Mistake(f"{group}={name} has no setting {setting!r}{near(setting, known)}")
    hints = _hints(component)
    given = {}
    for setting, value in values.items():
        if isinstance(value, Nested):
            given[setting] = _built(value.group, value.name, value.settings, outside)
            continue
        if isinstance(value, str) and (refers := re.fullmatch(r"\$\{(\w+)\}", value)):
            value = outside[refers[1]]
        given[setting] = _fitting(f"{group}.{setting}", value, hints.get(setting, Any))
    needed = [
        setting
        for setting, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for setting in needed:
        if given.get(setting, "???") == "???":
            raise Mistake(f"{group}={name} needs a value for {setting}")
    return component(**given)


@cache
def _hints(component: type) -> dict[str, Any]:
    """The types of a class's fields, as far as they are known without imports for type checking."""
    try:
        return typing.get_type_hints(component)
    except NameError:
        return {}


def _fitting(setting: str, value: Any, hint: Any) -> Any:
    """The value in its field's type: YAML reads 1e-5 as a text, and an integer may stand for a float."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not isinstance(value, hint):
        raise Mistake(
            f"{setting} must be the name of an option, its settings, or an object of {hint.__name__}, got {value!r}"
        )
    wanted = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    kinds = {kind for kind in wanted if kind in (int, float, str, bool, types.NoneType)}
    if kinds != wanted or (value is None and types.NoneType in kinds) or type(value) in kinds:
        return value
    if float in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    words = {float: "a number", int: "an integer", str: "a text", bool: "true or false", types.NoneType: "None"}
    expected = " or ".join(words[kind] for kind in (float, int, str, bool, types.NoneType) if kind in kinds)
    raise Mistake(f"{setting} must be {expected}, got {value!r}")


def _read(path: Path) -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return content
