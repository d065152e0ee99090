"""Composes and checks every run of a sweep before the first one starts, then runs or submits them."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from esparse.cli import foresight, registry, remarks
from esparse.cli.attempt import carry_out_all
from esparse.cli.call import FAILED, call
from esparse.cli.end_of_sweep import end_of_sweep
from esparse.cli.main import mistakes
from esparse.cli.messages import sentence
from esparse.errors import Mistake
from esparse.jobs import run_states
from esparse.records.groups import display_name
from esparse.records.report import run_id

log = logging.getLogger("esparse")

MANY = 100  # runs, of which the check takes ten seconds and more


class Sweep(Callback):
    """Checks every run of a sweep before the first one starts, and prints one table after the last."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        call.runs.clear()
        with mistakes(), contextlib.suppress(ConfigCompositionException):  # Hydra itself reports those, next
            call.sweep = Path(config.hydra.sweep.dir).name
            lines: list[str] = []
            jobs = _jobs(config)
            if not jobs:
                raise Mistake("the sweep has no run: a range(...) or glob(...) in it gives no value")
            if len(jobs) >= MANY:
                log.info("checking %d runs before the first one begins", len(jobs))
            for overrides in jobs:
                call.runs[tuple(overrides)], sentences = _composed(config, overrides)
                lines += sentences
            if not all(settings["dry_run"] for settings in call.runs.values()):
                foresight.check_queue(OmegaConf.to_container(config.hydra.launcher))  # type: ignore[arg-type]
            _check_exports(list(call.runs.values()))
            remarks.say(lines)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if call.submitted or all(settings["dry_run"] for settings in call.runs.values()):
            return
        ends = {run_states.folder_of(settings): settings for settings in call.runs.values()}
        call.begun = True
        call.code = end_of_sweep(Path(config.hydra.sweep.dir), ends, run_states.states_of(ends))


def give_away(submit: Callable[[], bool], settings: Sequence[dict[str, Any]]) -> None:
    """Lets a queue carry out the runs of this call; `submit` returns whether it waited until they ended.

    Plans are made here: they take no node.
    """
    if plans := [each for each in settings if each["dry_run"]]:
        carry_out_all(plans)
        return
    call.begun = True
    try:
        with mistakes():
            call.submitted = not submit()
    except OSError as error:
        print(f"esparse: {sentence(error)}", file=sys.stderr)
        raise SystemExit(FAILED) from None


def _check_exports(runs: Sequence[Mapping[str, Any]]) -> None:
    """Raises Mistake if several runs would export to one folder, of which only the last one's model would be left."""
    places: dict[Path, dict[str, str]] = {}
    for settings in runs:
        if (path := settings["export"].get("path")) is not None:
            place = Path(path).expanduser().resolve()
            places.setdefault(place, {})[run_id(settings)] = display_name(settings)
    for place, names in places.items():
        if len(names) > 1:
            first, second, *more = names.values()
            others = f" and {len(more)} more" if more else ""
            raise Mistake(
                f"export.path={place} is one folder for {len(names)} runs of the sweep ({first}; {second}{others}): "
                "leave export.path out, and each exports into its own folder"
            )


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's basic sweeper multiplies them out."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    in_file = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [f"{key}={value}" for key, value in in_file.items()] + list(config.hydra.overrides.task)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    # With Hydra's loader: glob(*) asks it which options a group has.
    overrides = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(texts)
    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def _composed(sweep: DictConfig, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of one run, and the remarks on them."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    config = hydra.config_loader.load_sweep_config(sweep, overrides)
    choices = config.hydra.runtime.choices
    experiment = registry.build(config)
    settings = registry.resolved(config, experiment, choices)
    remarks.check_method(choices, typed=sweep.hydra.overrides.task, file=sweep.hydra.job.config_name)
    foresight.check(experiment, settings, queued=foresight.is_slurm(config.hydra.launcher))
    return settings, remarks.remarks(settings, choices, experiment.method())
