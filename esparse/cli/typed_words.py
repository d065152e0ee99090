"""The words that were typed, before Hydra sees them: flags and settings in any order, and what Hydra would let pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hydra._internal.utils import get_args_parser

from esparse.errors import Mistake
from esparse.parts.conf_folder import conf_folder
from esparse.parts.numbers import names, near
from esparse.records.groups import GROUPS
from esparse.run.settings import Experiment

SETTING = re.compile(r"([+~]{0,2})([\w./@:-]+)=(.*)", flags=re.S)
# Groups of Hydra's own, which are chosen with a slash: a dot would put a text in place of their settings.
HYDRAS = "launcher|sweeper|job_logging|hydra_logging|help|hydra_help|output|env"
METHOD = "method"
KINDS_OF_CALL = ("run", "multirun", "cfg", "info", "shell_completion")
SETTINGS = {field.name: str(field.type) for field in fields(Experiment) if field.name not in GROUPS}  # of a whole run
EXPERIMENTS = "experiments"  # the usual folder of -cd


def arranged(words: Sequence[str]) -> list[str]:
    """Flags with their values in front, then settings: Hydra takes them in no other order.

    Raises Mistake for a flag that there is not.
    """
    flags, settings = parted(words)
    return [*flags, *settings]


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and settings; raises Mistake for a flag that there is not."""
    flags, settings, rest = [], [], list(words)
    known = get_args_parser()._option_string_actions
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            settings.append(word)
            continue
        name, has_value, _ = word.partition("=")
        action = known.get(name)
        if action is None:
            raise Mistake(_no_flag(word, [flag for flag in known if flag.startswith("--")]))
        if name in ("-cp", "--config-path"):
            raise Mistake(
                f"{name} would put a folder in place of esparse's own configuration: -cd FOLDER adds one to it"
            )
        flags.append(word)
        alone = not rest or rest[0].startswith("-")
        if alone and action.nargs is None and not has_value:
            raise Mistake(_needs_value(word, [other for other in words if other != word]))
        if has_value or action.nargs == 0 or alone:
            continue
        if action.nargs is None or "=" not in rest[0]:  # --info takes a word, or none
            if action.choices and rest[0] not in action.choices:
                raise Mistake(f"{word} takes {', '.join(map(str, action.choices))}, got {rest[0]!r}")
            flags.append(rest.pop(0))
    _check_together(flags)
    return flags, settings


def _check_together(flags: Sequence[str]) -> None:
    """Raises Mistake for flags of which Hydra would take one."""
    known = get_args_parser()._option_string_actions
    given: dict[str, list[str]] = {}
    for word in flags:
        if (action := known.get(word.partition("=")[0])) is not None:
            given.setdefault(action.dest, []).append(word)
    kinds = [words[0] for dest, words in given.items() if dest in KINDS_OF_CALL]
    if len(kinds) > 1:
        raise Mistake(f"{' and '.join(kinds)} are different calls: give one of them")
    for dest, words in given.items():
        if len(words) > 1 and known[words[0].partition("=")[0]].nargs is None and dest != "info":
            raise Mistake(f"{words[0].partition('=')[0]} is given twice, and takes one value: leave one out")


def _no_flag(word: str, known: list[str]) -> str:
    name, equals, value = word.lstrip("-").partition("=")
    if (key := name.replace("-", "_")) in SETTINGS and not equals:
        return f"settings have no dashes: {with_value(key)} in place of {word}"
    if name.partition(".")[0] in (*GROUPS, METHOD) or equals:
        return f"settings have no dashes: {name}={value or 'OPTION'} in place of {word}"
    return f"there is no flag {word}{near(word, known)}"


def _needs_value(word: str, others: Sequence[str]) -> str:
    """A flag without its value; of an experiment's name, which there are."""
    if word not in ("-cn", "--config-name"):
        return f"{word} needs a value behind it" + (": -cd FOLDER" if word in ("-cd", "--config-dir") else "")
    folder = flag(others, "-cd", "--config-dir") or EXPERIMENTS
    known = ", ".join(experiments(folder))
    return f"{word} needs the name of an experiment: -cd {folder} -cn NAME" + (f"; there is {known}" if known else "")


def experiments(folder: str | None) -> list[str]:
    """The names that -cn may have, with this folder as -cd."""
    folders = [conf_folder(), *([Path(folder)] if folder else [])]
    return sorted({path.stem for place in folders for path in place.glob("*.yaml")} - {"config"})


def flag(words: Sequence[str], *names: str) -> str | None:
    """The value of a flag with one of these names."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else next(iter(words[i + 1 :]), None)
    return None


def check(words: Sequence[str]) -> None:
    """Raises Mistake for a setting that Hydra would misread, or refuse in its own words."""
    for word in words:
        if word.startswith("="):
            raise Mistake(f"{word} has no setting in front of its =: write {with_group(word[1:])}")
        if given := re.fullmatch(rf"(\+{{0,2}})hydra\.({HYDRAS})=(\w.*)", word):
            raise Mistake(f"hydra/{given[2]}={given[3]} chooses it, with a slash; {word} would change nothing")
        if word.startswith("~"):
            _check_taken_away(word)
        match = SETTING.fullmatch(word)
        if match is not None and match[2].startswith(f"{METHOD}."):
            raise Mistake(
                f"{word}: a method has no settings of its own, but sets those of other groups, which may be changed "
                f"behind it: {METHOD}=NAME metric.gamma=VALUE"
            )
        if match is None or match[2] not in (*GROUPS, METHOD):
            continue
        group, option = match[2], match[3]
        if match[1].startswith("+"):
            raise Mistake(f"{group} has an option already, and + adds what is not there: write {group}={option}")
        if re.fullmatch(r"-?\d+(\.\d*)?|true|false", option.lower()):
            raise Mistake(f"there is no {group} {option!r}{near(option, names(group))}")
        if option.startswith("[") and "," in option:
            tasks = f"; tasks are named by zeroshot.tasks={option}" if group == "zeroshot" else ""
            raise Mistake(f"{group} takes one option, not a list of them; -m {group}=A,B makes a sweep{tasks}")
        if option in ("null", "~") and group != METHOD:
            neutral = GROUPS[group].neutral
            other = f": {group}={neutral} does nothing" if neutral else " (--help lists them)"
            raise Mistake(f"{group} takes one of its options, not {option}{other}")


def _check_taken_away(word: str) -> None:
    """Raises Mistake for a ~ in front of a group or a setting of esparse's; Hydra's own may be taken away."""
    key = word.lstrip("~").partition("=")[0]
    if key.startswith("hydra"):
        return
    neutral = GROUPS[key].neutral if key in GROUPS else None
    other = (
        f": {key}={neutral} does nothing"
        if neutral
        else ": method=none is the default"
        if key == METHOD
        else ", only changed"
    )
    what = "group" if key in (*GROUPS, METHOD) else "setting"
    raise Mistake(f"{word}: a {what} cannot be taken away{other}")


def with_group(option: str) -> str:
    """An option as it is chosen, metric=wanda; KEY=VALUE for a word that is none."""
    groups = [name for name, group in GROUPS.items() if option in names(name) and option != group.neutral]
    return f"{groups[0]}={option}" if groups and option not in GROUPS else "KEY=VALUE"


def in_hydras_words(words: Sequence[str]) -> list[str]:
    """method=null asks for none, which Hydra has no word for; dry_run.device=a100 is dry_run=a100."""
    kept = [word for word in words if word not in ("method=null", "method=none")]
    return [re.sub(r"^dry_run\.device=", "dry_run=", word) for word in kept]


def with_value(setting: str) -> str:
    return f"{setting}={'true' if SETTINGS[setting] in ('bool', 'Any') else 'VALUE'}"


def doubled(words: Sequence[str]) -> list[str]:
    """A sentence for each setting that is given more than once, of which the last one counts."""
    given: dict[str, list[str]] = {}
    for word in words:
        if match := SETTING.fullmatch(word):
            given.setdefault(match[2], []).append(word)
    return [
        f"{key} is given {'twice' if len(times) == 2 else f'{len(times)} times'}: {times[-1]} counts, "
        f"{' and '.join(dict.fromkeys(times[:-1]))} does not"
        for key, times in given.items()
        if len(set(times)) > 1
    ]
