"""Hydra's side of the groups: their classes as schemas, and a composed configuration as the objects themselves.

Hydra composes YAML over the classes of esparse/records/groups.py, so that a wrong key or type is found before anything
runs; `build` turns the composed configuration into the objects.
"""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from esparse.cli import help_text
from esparse.cli.hydra_errors import check_added
from esparse.errors import Mistake
from esparse.jobs.launchers import LAUNCHERS
from esparse.parts import extras, plugins
from esparse.records.groups import GROUPS
from esparse.run.settings import Experiment, expanded

# The classes themselves. A test or a notebook may add one.
CHOICES: dict[str, dict[str, type]] = {
    name: {option: group.component(option) for option in group.options} for name, group in GROUPS.items()
}


def register() -> None:
    """Tells Hydra the classes: conf/metric/entropy.yaml begins with `/schema/metric/entropy@_here_`."""
    help_text.register()
    OmegaConf.register_new_resolver("esparse_path", expanded, replace=True)
    OmegaConf.register_new_resolver("esparse_plugins", plugins.in_words, replace=True)  # of --help
    store = ConfigStore.instance()
    store.store(name="experiment", group="schema", package="_global_", node=Experiment)
    for group, options in CHOICES.items():
        for option, component in options.items():
            store.store(name=option, group=f"schema/{group}", node=component)
        for option, component in plugins.of(group).items():
            store.store(name=option, group=group, node=_with_numbers(component, option))
    for executor, settings in LAUNCHERS.items():
        store.store(name=executor, group="schema/launcher", node=settings)


def build(config: DictConfig) -> Experiment:
    """Builds the experiment of a composed configuration; raises ValueError for wrong settings."""
    plain = _without_hydra(config)
    check_added(plain, sys.argv[1:])
    experiment = OmegaConf.to_object(plain)
    assert isinstance(experiment, Experiment)
    extras.check(experiment)
    return experiment


def resolved(config: DictConfig, experiment: Experiment, choices: dict[str, Any]) -> dict[str, Any]:
    """The configuration as the record keeps it: plain values, each component's class, and the options chosen."""
    settings: dict[str, Any] = OmegaConf.to_container(_without_hydra(config), resolve=True)  # type: ignore[assignment]
    for group in CHOICES:
        _name_classes(settings[group], getattr(experiment, group))
    if several := [group for group in CHOICES if group not in choices]:
        raise Mistake(f"{several[0]} takes one option, not a list of them")
    settings["output_root"] = experiment.output_root
    settings["choices"] = {group: choices[group] for group in CHOICES}
    return settings


def rebuilt(settings: dict[str, Any]) -> Experiment:
    """The experiment of these resolved settings; raises ValueError if a class has changed since then."""

    def component(group: str, given: dict[str, Any]) -> Any:
        given = dict(given)
        name = given.pop("_class")
        classes = {plugins.class_name(known): known for known in (CHOICES[group] | plugins.of(group)).values()}
        try:
            nested = {k: component(group, v) for k, v in given.items() if isinstance(v, dict) and "_class" in v}
            return classes[name](**given | nested)
        except (KeyError, TypeError):
            raise Mistake(f"another version of esparse made these settings of {name}: submit the sweep anew") from None

    parts = {k: component(k, v) if k in CHOICES else v for k, v in settings.items() if k != "choices"}
    return Experiment(**parts)


def _name_classes(settings: dict[str, Any], component: Any) -> None:
    """Adds class names, because two components with equal settings may be of different classes."""
    settings["_class"] = plugins.class_name(type(component))
    for field in fields(component):
        if is_dataclass(getattr(component, field.name)):
            _name_classes(settings[field.name], getattr(component, field.name))


def _with_numbers(component: type, option: str) -> Any:
    """The schema of a plug-in's class, with the numbers beside its module."""
    return OmegaConf.merge(OmegaConf.structured(component), plugins.numbers(component, option))


def _without_hydra(config: DictConfig) -> DictConfig:
    config = config.copy()
    with open_dict(config):
        config.pop("hydra", None)
    return config
