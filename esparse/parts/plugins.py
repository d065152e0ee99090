"""Parts that others bring: packages by entry points, notebooks by `register`.

A package names its classes in its pyproject.toml, under the group of the command line that they belong to:

    [project.entry-points."esparse.metric"]
    mine = "my_package.metrics:Mine"

A class is a dataclass that implements the group's base class (esparse.metrics.Metric, ...), and imports torch inside
its methods only. Its numbers are the defaults of its fields, or stand in `mine.yaml` beside its module.

What is particular to a family of models is a function, under the family's name (config.model_type): it is given the
model before its blocks are looked at, may change it in memory, and returns regular expressions of layers that stay
dense.

    [project.entry-points."esparse.quirk"]
    my_family = "my_package.models:quirk"
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from esparse.errors import Mistake

log = logging.getLogger("esparse")

# The base class of each group to which others may add.
BASES = {
    "prepare": "esparse.prepare:Prepare",
    "metric": "esparse.metrics:Metric",
    "allocation": "esparse.allocations:Allocation",
    "shuffle": "esparse.shuffles:Shuffle",
    "update": "esparse.updates:Update",
    "recovery": "esparse.recoveries:Recovery",
    "export": "esparse.export:Export",
    "bench": "esparse.bench:Bench",
    "tracking": "esparse.run.tracking:Tracking",
}
QUIRK = "quirk"
# Classes that were renamed: records and run ids keep the names that they were first recorded under.
RECORDED_AS = {"Chain": "Then", "Alternating": "Best"}
_registered: dict[str, dict[str, Any]] = {group: {} for group in (*BASES, QUIRK)}


def register(group: str, name: str, component: Any) -> None:
    """Adds an option to a group for this process: `register("metric", "mine", Mine)`; or a quirk of a family of models.

    The same name may be given again, as a cell of a notebook is carried out again. Raises Mistake for a group that
    takes none, a name that esparse or a package has already, or a class of another kind.
    """
    if group not in _registered:
        raise Mistake(f"nothing can be added to the group {group!r}, only to {', '.join(_registered)}")
    if name in _from_packages(group):
        raise Mistake(f"there is a {group} {name!r} already, which a package brings: take another name")
    _check(group, name, component)
    _registered[group][name] = component


def of(group: str) -> dict[str, Any]:
    """The classes that others added to a group, by the names of their options; of quirks the functions."""
    return _from_packages(group) | _registered.get(group, {})


def quirks(model: Any) -> list[str]:
    """Carries out the quirk of the model's family, if there is one; the layers that it wants to stay dense."""
    quirk = of(QUIRK).get(model.config.model_type)
    return [] if quirk is None else list(quirk(model) or ())


def in_words() -> str:
    """What --help says of them, on a line of its own; nothing if there are none."""
    names = [f"{group}={name}" for group in BASES for name in sorted(of(group))]
    return f"\n    of other packages: {' '.join(names)}" if names else ""


def numbers(component: type, name: str) -> dict[str, Any]:
    """The settings that stand in the YAML file beside the class's module; none if there is no such file."""
    module = sys.modules.get(component.__module__)
    file = getattr(module, "__file__", None)
    path = None if file is None else Path(file).with_name(f"{name}.yaml")
    if path is None or not path.is_file():
        return {}
    import yaml

    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    unknown = set(content) - {field.name for field in dataclasses.fields(component)}
    if unknown:
        raise Mistake(f"{path} has {', '.join(sorted(unknown))}, which {component.__name__} has not")
    return content


def class_name(component: type) -> str:
    """The name of a class in records and run ids: for a class that is not esparse's, with its module."""
    module, name = component.__module__, component.__qualname__
    return RECORDED_AS.get(name, name) if module.partition(".")[0] == "esparse" else f"{module}:{name}"


@cache
def _from_packages(group: str) -> dict[str, Any]:
    """One that cannot be used is left out, with a warning: the others, and esparse itself, still work."""
    found: dict[str, Any] = {}
    for entry in entry_points(group=f"esparse.{group}"):
        try:
            component = entry.load()
            if entry.name in found:
                raise Mistake("another package brings one of this name")
            _check(group, entry.name, component)
        except Exception as error:  # a stranger's module may fail in any way
            package = entry.dist.name if entry.dist else entry.value
            log.warning("%s=%s of the package %s is left out: %s", group, entry.name, package, error)
            continue
        found[entry.name] = component
    return found


def _check(group: str, name: str, component: Any) -> None:
    from esparse.parts.conf_folder import conf_folder

    if group == QUIRK:
        if not callable(component):
            raise Mistake(f"the quirk of {name} must be a function of the model, got {component!r}")
        return
    module, _, base = BASES[group].partition(":")
    wanted = getattr(import_module(module), base)
    if not name.isidentifier():
        raise Mistake(f"the name of a {group} must be one word of letters, digits and underscores, got {name!r}")
    if (conf_folder() / group / f"{name}.yaml").is_file():
        raise Mistake(f"esparse has a {group} {name!r} itself: take another name")
    if not (isinstance(component, type) and issubclass(component, wanted) and dataclasses.is_dataclass(component)):
        raise Mistake(f"{group}={name} must be a dataclass that extends {module}.{base}, got {component!r}")
