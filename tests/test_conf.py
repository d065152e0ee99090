"""Every option of conf/ composes into its class, and the help text names all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hydra import compose

from esparse.cli import registry
from esparse.records.groups import GROUPS, METHOD_GROUPS, acting, display_name
from esparse.records.report import run_id
from esparse.run.settings import Experiment
from tests.composing import composing
from tests.workshop import launch

CONF = Path(__file__).parent.parent / "conf"
# A method sets other groups, and is no part of a run itself.
FOLDERS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "method"))
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
OPTIONS = [(group, path.stem) for group in FOLDERS for path in sorted((CONF / group).glob("*.yaml"))]
ROW = "then"  # the class of options that are several others in a row; no option by itself
# What an option cannot know by itself.
NEEDED = {"hf": ["model.path=somewhere"]}
NEEDED_BY = {
    ("export", "dense"): ["shuffle=none"],
    ("calibration", "text"): ["calibration.path=f.txt"],
    ("evaluate", "text"): ["evaluate.path=f.txt"],
    ("allocation", "owl"): ["pattern=8:16"],
    ("allocation", "error"): ["pattern=8:16"],
}


def tried_elsewhere(group: str, option: str) -> bool:
    """Names of models differ in two words of one class; test_every_option.py prunes with each part of a method."""
    if group == "model":
        return option not in ("tiny", "hf")
    return group in METHOD_GROUPS and option != next(name for of, name in OPTIONS if of == group)


@pytest.fixture(autouse=True)
def conf_is_read() -> Iterator[None]:
    with composing():
        yield


def experiment(*overrides: str) -> Experiment:
    return registry.build(compose("config", list(overrides)))


def settings(*overrides: str) -> dict:
    config = compose("config", list(overrides), return_hydra_config=True)
    return registry.resolved(config, registry.build(config), config.hydra.runtime.choices)


def test_the_contracts_defaults() -> None:
    asked = settings()
    expected = {
        "model": "tiny",
        "prepare": "none",
        "allocation": "uniform",
        "metric": "sparsegpt",
        "shuffle": "none",
        "update": "sparsegpt",
        "recovery": "none",
        "quantise": "none",
        "calibration": "builtin",
        "evaluate": "builtin",
        "zeroshot": "none",
        "export": "none",
        "bench": "none",
        "tracking": "wandb",
    }
    assert asked["choices"] == expected
    assert asked["pattern"] == "2:4"
    assert asked["tracking"]["mode"] == "offline"


@pytest.mark.parametrize(
    ("group", "option"),
    [pytest.param(*o, marks=pytest.mark.slow if tried_elsewhere(*o) else ()) for o in OPTIONS],
)
def test_every_option_composes_into_its_class_and_its_settings_become_the_experiment_again(
    group: str, option: str
) -> None:
    extra = NEEDED.get(option, []) + NEEDED_BY.get((group, option), [])
    config = compose("config", [f"{group}={option}", *extra], return_hydra_config=True)
    asked = registry.build(config)
    component = getattr(asked, group)
    assert type(component) is GROUPS[group].component(option)
    assert is_dataclass(component)
    # What a node reads from sweep.json is what was composed where the sweep was submitted.
    settings = registry.resolved(config, asked, config.hydra.runtime.choices)
    assert registry.rebuilt(json.loads(json.dumps(settings))) == asked


def test_table_of_choices_and_folder_agree() -> None:
    assert set(registry.CHOICES) == set(GROUPS) == set(FOLDERS)
    for group, known in registry.CHOICES.items():
        if "any" not in known:
            assert set(known) - {ROW} == {option for of, option in OPTIONS if of == group}


def test_sparsegpt_implies_its_update_and_can_do_without() -> None:
    assert experiment("metric=sparsegpt").update.mask == "own"
    assert experiment("metric=sparsegpt", "update=obs").update.mask == "start"
    assert type(experiment("metric=sparsegpt", "update=none").update).__name__ == "NoUpdate"


def chosen(*overrides: str) -> list[str]:
    """The options that act, in their order."""
    return acting(settings(*overrides)["choices"])


def test_a_metric_alone_is_its_papers_method() -> None:
    assert chosen("metric=entropy") == ["entropy", "esparse"]
    assert chosen("metric=wanda") == ["wanda"]
    assert chosen() == chosen("metric=sparsegpt") == ["sparsegpt", "sparsegpt"]
    assert chosen("metric=entropy", "shuffle=none") == ["entropy"]
    assert chosen("metric=wanda", "shuffle=esparse") == ["wanda", "esparse"]


# Of each method the options that do something, from its paper.
OF_METHODS = {
    "magnitude": ["magnitude"],
    "wanda": ["wanda"],
    "sparsegpt": ["sparsegpt", "sparsegpt"],
    "ria": ["ria", "lsa"],
    "esparse": ["esparse_paper", "esparse"],
    "nowag": ["nowag"],
    "gblm": ["gradient"],
    "owl": ["wanda", "owl"],
    "admm": ["wanda", "admm"],
    "alps": ["wanda", "alps"],
    "ebft": ["wanda", "block"],
    "eight_sixteen": ["equalise", "ria", "variance_block"],
    "best": ["entropy", "esparse", "alps_parent", "distill"],
    "servable": ["entropy", "foldable", "alps_parent", "distill"],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_by_name_sets_every_part(name: str) -> None:
    assert set(OF_METHODS) == set(METHODS)
    assert chosen(f"method={name}", "pattern=8:16") == OF_METHODS[name]


@pytest.mark.tries(3)
@pytest.mark.parametrize("name", METHODS)
def test_each_part_of_a_method_can_be_changed(name: str) -> None:
    # Whatever else is chosen in front of it or behind it on the command line goes before.
    changed = ["prepare=none", "metric=ria", "allocation=uniform", "shuffle=gns", "update=obs", "recovery=bias"]
    assert chosen(*changed, f"method={name}", "pattern=8:16") == ["ria", "gns", "obs", "bias"]


def test_a_method_is_the_same_run_as_its_parts() -> None:
    assert run_id(settings("method=esparse")) == run_id(settings("metric=esparse_paper"))
    assert run_id(settings("method=wanda")) == run_id(settings("metric=wanda"))
    asked = settings("method=eight_sixteen")
    assert (asked["pattern"], asked["outliers"]) == ("8:16", "16:256")
    assert settings("method=eight_sixteen", "pattern=2:4")["pattern"] == "2:4"


def test_updates_in_a_row_keep_their_classes_in_the_record() -> None:
    update = settings("update=joint")["update"]
    assert (update["_class"], update["first"]["_class"]) == ("Then", "Alps")
    assert (update["second"]["first"]["_class"], update["second"]["second"]["_class"]) == ("Swap", "Support")


def test_help_names_every_option_and_value() -> None:
    done = launch("--help", cwd=CONF.parent)
    assert done.returncode == 0 and not done.stderr, done.stderr
    text, _, _ = done.stdout.partition("All settings of this command line")
    lines = text.splitlines()
    for group, option in [*OPTIONS, *(("method", name) for name in METHODS)]:
        start = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{group}="))
        end = next(i for i in range(start + 1, len(lines)) if "=" in lines[i].split("(")[0])
        words = " ".join(lines[start:end]).replace("|", " ").split()
        assert option in words or f"{group}={option}" in words, f"--help does not name {group}={option}"
    for field in fields(Experiment):
        assert f"{field.name}=" in text


def test_numbers_live_in_yaml_alone() -> None:
    for known in registry.CHOICES.values():
        for component in known.values():
            for field in fields(component):
                has_number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
                assert not has_number, f"{component.__name__}.{field.name} has a number in Python"


def test_every_yaml_says_what_it_is() -> None:
    for path in CONF.rglob("*.yaml"):
        if path.parent.name != "help":
            text = path.read_text().removeprefix("# @package _global_\n")
            assert text.startswith("# "), f"{path} does not open with a sentence"


@pytest.mark.slow
def test_run_id_is_what_was_asked_and_not_where_it_ran() -> None:
    usual = run_id(settings())
    how = ["output_root=x", "tracking=none", "rerun=true", "model.devices=cpu", "model.batch_tokens=1"]
    for elsewhere in [*how, "model.store=shards", "model.activations=disk", "dry_run=true"]:
        assert run_id(settings(elsewhere)) == usual, elsewhere
    others = ["metric=wanda", "metric=magnitude", "pattern=4:8", "seed=1", "metric.damp=2", "shuffle=gns"]
    others += ["shuffle=lbs", "calibration.length=64", "evaluate.max_tokens=1024", "model.skip=[o_proj]"]
    others += ["export=packed", "bench=gemm", "bench=model", "zeroshot=builtin", "profile=true", "quantise=int8"]
    ids = [usual, *(run_id(settings(other)) for other in others), run_id(settings("export=dense", "shuffle=none"))]
    assert len(set(ids)) == len(ids)


def test_a_part_that_asks_for_nothing_does_not_make_another_run() -> None:
    with_all = settings("seed=5")
    without = {
        key: value
        for key, value in with_all.items()
        if key not in ("bench", "export", "zeroshot", "profile", "quantise")
    }
    assert run_id(without) == run_id(with_all)
    assert run_id(settings("seed=5", "zeroshot.tasks=[piqa]")) != run_id(with_all)
    for group in ("calibration", "evaluate"):  # which came later
        older = {key: value for key, value in with_all[group].items() if key not in ("bos", "chat")}
        assert run_id(with_all | {group: older}) == run_id(with_all)
        for asked in (f"{group}.bos=true", f"{group}.bos=false"):
            assert run_id(settings("seed=5", asked)) != run_id(with_all)


def test_every_group_says_what_it_counts_for() -> None:
    asked = settings()
    for name, group in GROUPS.items():
        assert group.neutral is None or (CONF / name / f"{group.neutral}.yaml").exists(), name
        assert set(group.notes) <= {option for of, option in OPTIONS if of == name}, f"notes on no option of {name}"
        if group.method and group.neutral:
            choices = asked["choices"] | {name: group.neutral}
            assert group.neutral not in display_name(asked | {"choices": choices}).split()
    assert METHOD_GROUPS == ("prepare", "metric", "allocation", "shuffle", "update", "recovery", "quantise")


def test_a_run_has_a_short_name() -> None:
    assert display_name(settings()) == "tiny 2:4 sparsegpt sparsegpt"
    assert display_name(settings("metric=entropy")) == "tiny 2:4 entropy esparse"
    assert display_name(settings("metric=wanda", "model=hf", "model.path=/a/b/opt/")) == "opt 2:4 wanda"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["metric=gradient", "prepare=equalise"], "use metric.source=block or prepare=none"),
        (["outliers=16:256", "pattern=50%"], "outliers survive beside an n:m pattern"),
        (["outliers=16:250"], "250 is not a multiple of 4"),
        (["recovery=dsnot", "pattern=50%@rows", "shuffle=none"], "dsnot"),
        (["allocation=owl"], "cannot change 2:4"),
    ],
)
@pytest.mark.tries(6)
def test_parts_that_do_not_go_together(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        experiment(*overrides)
