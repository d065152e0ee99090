"""Remarks on a run's settings before it begins: settings without effect, or with an unexpected one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra

from esparse.errors import Mistake
from esparse.pruning.method import Method
from esparse.records.groups import METHOD_GROUPS

log = logging.getLogger("esparse")


def remarks(settings: Mapping[str, Any], choices: Mapping[str, Any], method: Method) -> list[str]:
    """Sentences about one run. `settings`: resolved; `choices`: the options as Hydra chose them, `method` too."""
    found = [
        f"{group}={settings['choices'][group]} does nothing with pattern={settings['pattern']}, {why}"
        for group, why in method.idle().items()
    ]
    if name := choices.get("method"):
        other = [f"{g}={choices[g]} in place of {o}" for g, o in parts_of(name).items() if choices[g] != o]
        if other:
            found.append(f"method={name} with {', '.join(other)}")
    return found


def check_method(choices: Mapping[str, Any], *, typed: Sequence[str], file: str) -> None:
    """Raises Mistake if a method was typed and the file of the experiment sets parts of it otherwise: the file wins.

    `typed`: the settings on the command line, of a sweep as well. `file`: the configuration that was asked for.
    """
    keys = {word.lstrip("+").partition("=")[0] for word in typed}
    name = choices.get("method")
    if "method" not in keys or not name:
        return
    parts = parts_of(name)
    lost = {group: choices[group] for group in parts if choices[group] != parts[group] and group not in keys}
    if lost:
        raise Mistake(
            f"method={name} is not what would run: {file}.yaml has {_words(lost)}, which wins over it: type "
            f"{_words({group: parts[group] for group in lost})} as well, or leave method={name} out"
        )


def _words(parts: Mapping[str, Any]) -> str:
    return " ".join(f"{group}={option}" for group, option in parts.items())


def say(sentences: Iterable[str]) -> None:
    """Each of them once, in the order in which they came."""
    for sentence in dict.fromkeys(sentences):
        log.info("%s", sentence)


def parts_of(method: str) -> dict[str, str]:
    """The option of each group of METHOD_GROUPS that a named method sets."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    found = hydra.config_loader.repository.load_config(f"method/{method}")  # type: ignore[attr-defined]
    defaults = found.defaults_list if found is not None else []
    groups = {(d.group or "").lstrip("/"): d.value for d in defaults if isinstance(d, GroupDefault) and d.is_override()}
    return {group: str(option) for group, option in groups.items() if group in METHOD_GROUPS}
