"""The table of the command line's groups: options, their classes, and the meaning of a choice.

Help, run ids, names, tables, model cards and tests read this table. Classes are given by name, so that reading it loads
neither torch nor Hydra; other packages add options in the same form, as entry points. A new metric, shuffle or update
is one line here, and one YAML file with its numbers in conf/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

ANY = "any"  # stands for every YAML file of a group with one class


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group of the command line, metric=... for instance.

    `options`: the class of each option, as `module:Class`. `method`: whether the group belongs to the pruning method,
    and so to run names, model cards and comparisons with published numbers. `neutral`: the option that does nothing.
    `identity`: whether the choice enters the run's id; `idle`: whether settings have no effect and leave the id as it
    was before esparse had the group. `column`: the option's column in tables: in front, behind, or none, if other
    columns show it. `notes`: remarks on options in --help.
    """

    options: dict[str, str]
    method: bool = False
    neutral: str | None = None
    identity: bool = True
    idle: Callable[[Mapping[str, Any]], bool] = lambda settings: False
    column: Literal["front", "behind", "none"] = "none"
    notes: Mapping[str, str] = field(default_factory=dict)

    def component(self, option: str) -> type:
        """The class of an option. Raises KeyError for an option that the group lacks."""
        module, _, name = (self.options.get(ANY) or self.options[option]).partition(":")
        component: type = getattr(import_module(module), name)
        return component


def _no_settings(settings: Mapping[str, Any]) -> bool:
    return set(settings) <= {"_class"}  # only `none` has no settings


GROUPS: dict[str, Group] = {
    "model": Group(
        options={ANY: "esparse.models.load:Model"},
        notes={"tiny": "built in", "hf": "any: model.path=NAME_OR_DIR, or FILE.gguf"},
    ),
    "calibration": Group(
        options={ANY: "esparse.data.calibration:Calibration"},
        column="behind",
        notes={
            **dict.fromkeys(("builtin", "wikitext2", "c4", "ptb"), ""),
            "text": "calibration.path=FILE: .txt, .json, .jsonl, .parquet, ...",
        },
    ),
    "prepare": Group(
        options={
            "none": "esparse.prepare:NoPreparation",
            "equalise": "esparse.prepare.equalise:Equalise",
            "rotate": "esparse.prepare.rotate:RotateHeads",
        },
        method=True,
        neutral="none",
        column="behind",
        notes={"equalise": "SmoothQuant's scales", "rotate": "values in principal axes, head by head"},
    ),
    "metric": Group(
        options={
            "magnitude": "esparse.metrics.magnitude:Magnitude",
            "random": "esparse.metrics.random:Random",
            "wanda": "esparse.metrics.wanda:Wanda",
            "entropy": "esparse.metrics.entropy:Entropy",
            "esparse_paper": "esparse.metrics.entropy:EsparsePaper",
            "ria": "esparse.metrics.ria:Ria",
            "nowag": "esparse.metrics.nowag:NoWag",
            "gradient": "esparse.metrics.gradient:Gradient",
            "regional": "esparse.metrics.gradient:Gradient",
            "fisher": "esparse.metrics.fisher:Fisher",
            "sparsegpt": "esparse.metrics.sparsegpt:SparseGpt",
        },
        method=True,
        column="front",
        notes={
            **dict.fromkeys(("entropy", "esparse_paper"), "implies shuffle=esparse"),
            "sparsegpt": "implies update=sparsegpt",
        },
    ),
    "allocation": Group(
        options={
            "uniform": "esparse.allocations:Uniform",
            "owl": "esparse.allocations.owl:Owl",
            "error": "esparse.allocations.error:LayerError",
        },
        method=True,
        neutral="uniform",
        column="behind",
        notes={"owl": "by outliers", "error": "by measured error; 2:4 needs allocation.spread=0.25"},
    ),
    "shuffle": Group(
        options={
            "none": "esparse.shuffles:NoShuffle",
            "gns": "esparse.shuffles.gns:Gns",
            "lbs": "esparse.shuffles.lbs:Lbs",
            "esparse": "esparse.shuffles.lbs:Esparse",
            "foldable": "esparse.shuffles.lbs:Esparse",
            "lsa": "esparse.shuffles.lsa:Lsa",
            "best": "esparse.shuffles.lsa:Alternating",
        },
        method=True,
        neutral="none",
        column="front",
        notes={"esparse": "gns, lbs"},
    ),
    "update": Group(
        options={
            "none": "esparse.updates:NoUpdate",
            "obs": "esparse.updates.obs:Obs",
            "sparsegpt": "esparse.updates.obs:Obs",
            "support": "esparse.updates.support:Support",
            "swap": "esparse.updates.swap:Swap",
            "swap_best": "esparse.updates.swap:Swap",
            "refine": "esparse.updates:Chain",
            "admm": "esparse.updates.admm:Admm",
            "alps": "esparse.updates.alps:Alps",
            "joint": "esparse.updates:Chain",
            "alps_parent": "esparse.updates.parent:Parent",
            "sparsegpt_parent": "esparse.updates.parent:Parent",
            "then": "esparse.updates:Chain",
        },
        method=True,
        neutral="none",
        column="front",
        notes={"refine": "swap, support", "joint": "alps, swap, support"},
    ),
    "recovery": Group(
        options={
            "none": "esparse.recoveries:NoRecovery",
            "variance": "esparse.recoveries.variance:Variance",
            "bias": "esparse.recoveries.bias:Bias",
            "dsnot": "esparse.recoveries.dsnot:Dsnot",
            "window": "esparse.recoveries.window:Window",
            "window_parent": "esparse.recoveries.window:Window",
            "block": "esparse.recoveries.window:Window",
            "matching": "esparse.recoveries.window:Window",
            "variance_block": "esparse.recoveries:Chain",
            "distill": "esparse.recoveries.distill:Distill",
            "distill_lora": "esparse.recoveries.distill:Distill",
            "then": "esparse.recoveries:Chain",
        },
        method=True,
        neutral="none",
        column="front",
        notes={
            "window": "attention and MLP trained apart",
            "window_parent": "towards the dense model",
            "block": "EBFT",
            "matching": "3BASiL",
            "distill": "whole model, from its dense parent",
        },
    ),
    "quantise": Group(
        options={
            "none": "esparse.quantise:NoQuantise",
            "int8": "esparse.quantise.grids:Integer",
            "int4": "esparse.quantise.grids:Integer",
            "int3": "esparse.quantise.grids:Integer",
            "fp8": "esparse.quantise.grids:Float8",
            "nf4": "esparse.quantise.grids:NormalFloat",
        },
        method=True,
        neutral="none",
        idle=_no_settings,
        column="front",
        notes={"int8": "kept values; with pattern=dense GPTQ alone", "fp8": "e4m3", "nf4": "QLoRA's"},
    ),
    "evaluate": Group(
        options={ANY: "esparse.data.windows:Perplexity"},
        neutral="none",
        notes={
            **dict.fromkeys(("builtin", "wikitext2", "c4", "ptb"), ""),
            "paper": "the last three",
            "text": "evaluate.path=FILE",
            "none": "",
        },
    ),
    "zeroshot": Group(
        options={ANY: "esparse.evaluate.zeroshot:ZeroShot"},
        neutral="none",
        idle=lambda settings: not settings["tasks"],
        notes={
            "none": "",
            "builtin": "",
            "esparse": "its paper's tasks",
            "wanda": "its paper's tasks; any of lm-eval: zeroshot.tasks=[piqa,sciq]",
        },
    ),
    "export": Group(
        options={
            "none": "esparse.export:NoExport",
            "dense": "esparse.export.dense_checkpoint:Dense",
            "packed": "esparse.export.packed_checkpoint:Packed",
        },
        neutral="none",
        idle=_no_settings,
        notes={"dense": "a Hugging Face checkpoint with zeros", "packed": "without them, in esparse's format"},
    ),
    "bench": Group(
        options={
            "none": "esparse.bench:NoBench",
            "gemm": "esparse.bench.gemm:Gemm",
            "model": "esparse.bench.model:ModelBench",
        },
        neutral="none",
        idle=_no_settings,
        notes={"gemm": "matrix products", "model": "prefill and decode; dense against sparse, on a GPU"},
    ),
    "tracking": Group(
        options={"wandb": "esparse.run.tracking:Wandb", "none": "esparse.run.tracking:NoTracking"},
        neutral="none",
        identity=False,
    ),
}

# The groups that make up a method, in the order in which they act.
METHOD_GROUPS = tuple(name for name, group in GROUPS.items() if group.method)


def acts(group: str, option: str | None) -> bool:
    """Whether this option of the group does something; None: a record from before esparse had the group."""
    return option not in (None, "", GROUPS[group].neutral)


def acting(choices: Mapping[str, Any], groups: Iterable[str] = METHOD_GROUPS) -> list[str]:
    """The options that do something, in the order in which they act."""
    return [str(choices[group]) for group in groups if acts(group, choices.get(group))]


def display_name(settings: Mapping[str, Any]) -> str:
    """A short name of a run: model, pattern, and every part of the method that does something."""
    model = settings["model"]["name"] or settings["model"]["path"].rstrip("/").rpartition("/")[2]
    pattern = "+".join(text for text in (settings["pattern"], settings["outliers"]) if text)
    return " ".join([model, pattern, *acting(settings["choices"])])
