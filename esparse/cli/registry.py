"""The one table of choices: which class stands behind which option of the command line.

Hydra composes YAML over these classes, so that a wrong key or type is found before anything runs; `build` turns the
composed configuration into the objects themselves. A new metric, shuffle or update is one line here, and one YAML file
with its numbers in conf/.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from esparse.allocations import Uniform
from esparse.allocations.error import LayerError
from esparse.allocations.owl import Owl
from esparse.bench import NoBench
from esparse.bench.gemm import Gemm
from esparse.bench.model import ModelBench
from esparse.data.calibration import Calibration
from esparse.data.windows import Perplexity
from esparse.evaluate.zeroshot import ZeroShot
from esparse.export import NoExport
from esparse.export.dense_checkpoint import Dense
from esparse.export.packed_checkpoint import Packed
from esparse.errors import Mistake
from esparse.jobs.launchers import LAUNCHERS
from esparse.metrics.entropy import Entropy
from esparse.metrics.fisher import Fisher
from esparse.metrics.gradient import Gradient
from esparse.metrics.magnitude import Magnitude
from esparse.metrics.nowag import NoWag
from esparse.metrics.random import Random
from esparse.metrics.ria import Ria
from esparse.metrics.sparsegpt import SparseGpt
from esparse.metrics.wanda import Wanda
from esparse.models.load import Model
from esparse.prepare import NoPreparation
from esparse.prepare.equalise import Equalise
from esparse.recoveries import NoRecovery
from esparse.recoveries import Then as RecoverThen
from esparse.recoveries.bias import Bias
from esparse.recoveries.distill import Distill
from esparse.recoveries.dsnot import Dsnot
from esparse.recoveries.variance import Variance
from esparse.recoveries.window import Window
from esparse.run.experiment import Experiment
from esparse.run.tracking import NoTracking, Wandb
from esparse.shuffles import NoShuffle
from esparse.shuffles.gns import Gns
from esparse.shuffles.lbs import Esparse, Lbs
from esparse.shuffles.lsa import Best, Lsa
from esparse.updates import NoUpdate, Then
from esparse.updates.admm import Admm
from esparse.updates.alps import Alps
from esparse.updates.obs import Obs
from esparse.updates.support import Support
from esparse.updates.swap import Swap

CHOICES: dict[str, dict[str, type]] = {
    "model": {"any": Model},
    "calibration": {"any": Calibration},
    "prepare": {"none": NoPreparation, "equalise": Equalise},
    "metric": {
        "magnitude": Magnitude,
        "random": Random,
        "wanda": Wanda,
        "entropy": Entropy,
        "ria": Ria,
        "nowag": NoWag,
        "sparsegpt": SparseGpt,
        "gradient": Gradient,
        "fisher": Fisher,
    },
    "allocation": {"uniform": Uniform, "owl": Owl, "error": LayerError},
    "shuffle": {"none": NoShuffle, "gns": Gns, "lbs": Lbs, "esparse": Esparse, "lsa": Lsa, "best": Best},
    "update": {
        "none": NoUpdate,
        "obs": Obs,
        "support": Support,
        "swap": Swap,
        "admm": Admm,
        "alps": Alps,
        "then": Then,
    },
    "recovery": {
        "none": NoRecovery,
        "variance": Variance,
        "bias": Bias,
        "dsnot": Dsnot,
        "window": Window,
        "distill": Distill,
        "then": RecoverThen,
    },
    "evaluate": {"any": Perplexity},
    "zeroshot": {"any": ZeroShot},
    "export": {"none": NoExport, "dense": Dense, "packed": Packed},
    "bench": {"none": NoBench, "gemm": Gemm, "model": ModelBench},
    "tracking": {"wandb": Wandb, "none": NoTracking},
}


# The groups that make up a run's name, in the order in which they act.
METHOD = ("prepare", "metric", "allocation", "shuffle", "update", "recovery")


def register() -> None:
    """Tells Hydra the classes: conf/metric/entropy.yaml begins with `/schema/metric/entropy@_here_`."""
    # A path with ~, as users write it.
    OmegaConf.register_new_resolver("home", lambda path: str(Path(path).expanduser()), replace=True)
    store = ConfigStore.instance()
    # For every group that --help lists, Hydra copies the whole store only to read it: seconds.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    store.store(name="experiment", group="schema", package="_global_", node=Experiment)
    for group, options in CHOICES.items():
        for option, component in options.items():
            store.store(name=option, group=f"schema/{group}", node=component)
    for executor, settings in LAUNCHERS.items():
        store.store(name=executor, group="schema/launcher", node=settings)


def build(config: DictConfig) -> Experiment:
    """The experiment that a composed configuration describes; ValueError where a setting makes no sense."""
    experiment = OmegaConf.to_object(_without_hydra(config))
    assert isinstance(experiment, Experiment)
    return experiment


def resolved(config: DictConfig, experiment: Experiment, choices: dict[str, Any]) -> dict[str, Any]:
    """The configuration as the record keeps it: plain values, each component's class, and the options chosen."""
    settings: dict[str, Any] = OmegaConf.to_container(_without_hydra(config), resolve=True)  # type: ignore[assignment]
    for group in CHOICES:
        _name_classes(settings[group], getattr(experiment, group))
    if several := [group for group in CHOICES if group not in choices]:
        raise Mistake(f"{several[0]} takes one option, not a list of them")
    settings["choices"] = {group: choices[group] for group in CHOICES}
    return settings


def rebuilt(settings: dict[str, Any]) -> Experiment:
    """The experiment whose settings `resolved` gave; ValueError where a class has changed since then."""

    def component(group: str, given: dict[str, Any]) -> Any:
        given = dict(given)
        name = given.pop("_class")
        classes = {known.__name__: known for known in CHOICES[group].values()}
        try:
            nested = {k: component(group, v) for k, v in given.items() if isinstance(v, dict) and "_class" in v}
            return classes[name](**given | nested)
        except (KeyError, TypeError):
            raise Mistake(
                f"another version of esparse made these settings of {name}: submit the sweep anew"
            ) from None

    parts = {k: component(k, v) if k in CHOICES else v for k, v in settings.items() if k != "choices"}
    return Experiment(**parts)


def _name_classes(settings: dict[str, Any], component: Any) -> None:
    """Two components with the same settings are still two: the class belongs to what was asked."""
    settings["_class"] = type(component).__name__
    for field in fields(component):
        if is_dataclass(getattr(component, field.name)):
            _name_classes(settings[field.name], getattr(component, field.name))


def _without_hydra(config: DictConfig) -> DictConfig:
    config = config.copy()
    with open_dict(config):
        config.pop("hydra", None)
    return config


def title(settings: dict[str, Any]) -> str:
    """A short name for people: model, pattern, and every choice that does something."""
    choices = settings["choices"]
    model = settings["model"]["name"] or settings["model"]["path"].rstrip("/").rpartition("/")[2]
    extras = [choices[group] for group in METHOD if choices[group] not in ("none", "uniform")]
    pattern = "+".join(text for text in (settings["pattern"], settings["outliers"]) if text)
    return " ".join([model, pattern, *extras])
