"""Plug-ins: parts from other packages by entry points, from notebooks by `register`.

A package names its classes in its pyproject.toml, under the group of the command line to which they belong:

    [project.entry-points."esparse.metric"]
    mine = "my_package.metrics:Mine"

The class is a dataclass that implements the group's base class (esparse.metrics.Metric, ...) and imports torch only
inside its methods. Its numbers are the defaults of its fields, or the contents of `mine.yaml` beside its module.

A quirk is a function for one family of models, under the family's name (config.model_type): it gets the model before
its blocks are found, may change it in memory, and returns regular expressions of layers that stay dense.

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

# The base class of each group that plug-ins may extend.
BASES = {
    "prepare": "esparse.prepare:Prepare",
    "metric": "esparse.metrics:Metric",
    "allocation": "esparse.allocations:Allocation",
    "shuffle": "esparse.shuffles:Shuffle",
    "update": "esparse.updates:Update",
    "recovery": "esparse.recoveries:Recovery",
    "quantise": "esparse.quantise:Quantise",
    "export": "esparse.export:Export",
    "bench": "esparse.bench:Bench",
    "tracking": "esparse.run.tracking:Tracking",
}
QUIRK = "quirk"
# Classes that were renamed: records and run ids keep the names that they were first recorded under.
RECORDED_AS = {"Chain": "Then", "Alternating": "Best"}
_registered: dict[str, dict[str, Any]] = {group: {} for group in (*BASES, QUIRK)}


def register(group: str, name: str, component: Any) -> None:
    """Adds an option to a group in this process, `register("metric", "mine", Mine)`, or a quirk of a family of models.

    A name may be registered again, because a notebook's cell may run again. Raises Mistake for a group that cannot be
    extended, a name that esparse or a package uses, or a class of another kind.
    """
    if group not in _registered:
        raise Mistake(f"nothing can be added to the group {group!r}, only to {', '.join(_registered)}")
    if name in _from_packages(group):
        raise Mistake(f"a package has a {group} {name!r} already: take another name")
    _check(group, name, component)
    _registered[group][name] = component


def of(group: str) -> dict[str, Any]:
    """The plug-ins of a group by option name: classes, or functions for quirks."""
    return _from_packages(group) | _registered.get(group, {})


def quirks(model: Any) -> list[str]:
    """Runs the quirk of the model's family, if there is one; returns the layers that it keeps dense."""
    quirk = of(QUIRK).get(model.config.model_type)
    return [] if quirk is None else list(quirk(model) or ())


def in_words() -> str:
    """The line about plug-ins in --help; empty if there are none."""
    names = [f"{group}={name}" for group in BASES for name in sorted(of(group))]
    return f"\n    of other packages: {' '.join(names)}" if names else ""


def numbers(component: type, name: str) -> dict[str, Any]:
    """The settings in the YAML file beside the class's module; empty if there is no such file."""
    module = sys.modules.get(component.__module__)
    file = getattr(module, "__file__", None)
    path = None if file is None else Path(file).with_name(f"{name}.yaml")
    if path is None or not path.is_file():
        return {}
    import yaml

    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    unknown = set(content) - {field.name for field in dataclasses.fields(component)}
    if unknown:
        raise Mistake(f"{path} sets {', '.join(sorted(unknown))}, which {component.__name__} does not have")
    return content


def class_name(component: type) -> str:
    """The name of a class in records and run ids: for a class that is not esparse's, with its module."""
    module, name = component.__module__, component.__qualname__
    return RECORDED_AS.get(name, name) if module.partition(".")[0] == "esparse" else f"{module}:{name}"


@cache
def _from_packages(group: str) -> dict[str, Any]:
    """The plug-ins of installed packages; leaves out a broken one with a warning, so that all others still work."""
    found: dict[str, Any] = {}
    for entry in entry_points(group=f"esparse.{group}"):
        try:
            component = entry.load()
            if entry.name in found:
                raise Mistake("another package has one of this name")
            _check(group, entry.name, component)
        except Exception as error:  # another package's module may raise anything
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
    if not (isinstance(name, str) and name.isidentifier()):
        raise Mistake(f"the name of a {group} must be one word of letters, digits and underscores, got {name!r}")
    if (conf_folder() / group / f"{name}.yaml").is_file():
        raise Mistake(f"esparse has a {group} {name!r} itself: take another name")
    if not (isinstance(component, type) and issubclass(component, wanted) and dataclasses.is_dataclass(component)):
        raise Mistake(f"{group}={name} must be a dataclass that extends {module}.{base}, got {component!r}")
