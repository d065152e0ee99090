"""Turns errors of Hydra and OmegaConf into sentences: what came, similar known words, all known words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from esparse.cli import chosen
from esparse.cli.typed_words import (
    EXPERIMENTS,
    METHOD,
    SETTING,
    SETTINGS,
    experiments,
    flag,
    parted,
    with_group,
    with_value,
)
from esparse.errors import Mistake
from esparse.parts import plugins
from esparse.parts.conf_folder import conf_folder
from esparse.parts.numbers import alike, names, near
from esparse.records.groups import ANY, GROUPS

KINDS = (  # of settings, by what OmegaConf says of a value that is none
    ("could not be converted to Integer", "a whole number"),
    ("could not be converted to Float", "a number"),
    ("is not a valid bool", "true or false"),
    ("to string", "a text"),
)

PATHS = {"model": ("model", "hf"), "calibration": ("text", "text"), "evaluate": ("text", "text")}  # by which option
FILES = (".gguf", ".txt", ".json", ".jsonl", ".gz", ".parquet")


def explained(error: BaseException, words: Sequence[str]) -> str | None:
    """The sentence for a mistake in the typed words; None if the error is not Hydra's."""
    chain = list(_causes(error))
    for one in chain:
        if isinstance(one, Mistake):  # of a resolver, inside of OmegaConf's error
            return str(one)
    for one in chain:
        if isinstance(one, MissingConfigException):
            return _no_option(one, words)
        if isinstance(one, SearchPathException):
            return f"-cd {flag(words, '-cd', '--config-dir')}: there is no such folder"
        if isinstance(one, OverrideParseException):
            return how_to_write(words) or f"{one.override} cannot be read: settings are written KEY=VALUE"
        if isinstance(one, ConfigKeyError | ConfigAttributeError) and one.full_key:
            return unknown_key(one.full_key, one.object_type, words)
        if isinstance(one, InterpolationResolutionError) and one.full_key:
            return _unresolved(one, words)
        if isinstance(one, ValidationError) and one.full_key:
            return _wrong_value(one, words)
    for one in chain:
        if isinstance(one, ConfigCompositionException) and (sentence := _composition(str(one))) is not None:
            return sentence
    if isinstance(error, ValueError) and str(error).startswith("The --resolve flag"):  # Hydra's own, of no own class
        return "--resolve belongs to --cfg: launch.py --cfg job --resolve"
    if any(isinstance(one, HydraException | OmegaConfBaseException) for one in chain):
        return " ".join(str(chain[0]).split())
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def unknown_key(path: str, owner: Any, words: Sequence[str]) -> str:
    """A setting that there is not: `owner` is the class that was to have it."""
    *above, key = path.split(".")
    known, where, sentence = _settings(owner), ".".join(above), f"there is no setting {path}"
    if not above:
        known = [*known, METHOD]
    likely = [f"{where}.{name}" if where else name for name in alike(key, known)]
    if not above:
        likely = [f"{group}.{key}" for group in GROUPS if key in _of_group(group)] or likely
    sentence += f": did you mean {' or '.join(likely)}?" if likely else ""
    end = "" if likely else ":"
    if not above:
        return sentence if likely else f"{sentence}: there is {', '.join(known)}"
    takes = ", ".join(sorted(known)) or "no settings"
    if above[0] not in GROUPS:
        return f"{sentence}{end} {where} takes {takes}"
    one_class = len(above) > 1 or ANY in GROUPS[where].options
    who = where if one_class else f"{where}={_option(where, owner, words)}"
    holders: dict[str, list[str]] = {}  # of each setting of the group's options, which have it
    for option, component in _classes(above[0]).items():
        for setting in _settings(component):
            holders.setdefault(setting, []).append(option)
    meant = [key] if key in holders else [] if likely else alike(key, holders)[:1]
    more = "".join(f"; {setting} is a setting of {where}={', '.join(holders[setting])}" for setting in meant)
    more = more if len(above) == 1 else ""
    return f"{sentence}{end} {who} takes {takes}{more}"


def check_added(config: DictConfig, words: Sequence[str]) -> None:
    """Raises Mistake for a setting added by + that nothing reads."""
    owner = OmegaConf.get_type(config)
    if not is_dataclass(owner):
        return
    known = {field.name for field in fields(owner)}
    for key in config:
        if key not in known:
            raise Mistake(unknown_key(config._get_full_key(key), owner, words))
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, str(key)):
            value = config._get_node(key)
            if isinstance(value, DictConfig) and not value._is_none():
                check_added(value, words)


def _settings(owner: Any) -> list[str]:
    return [field.name for field in fields(owner) if not field.name.startswith("_")] if is_dataclass(owner) else []


def _of_group(group: str) -> set[str]:
    """The settings that an option of the group has."""
    classes = _classes(group).values() if ANY not in GROUPS[group].options else [GROUPS[group].component(ANY)]
    return {setting for component in classes for setting in _settings(component)}


def _classes(group: str) -> dict[str, type]:
    """The class of each option with its own class."""
    own = {name: GROUPS[group].component(name) for name in GROUPS[group].options if name not in (ANY, "then")}
    return own | plugins.of(group)


def _option(group: str, owner: Any, words: Sequence[str]) -> str:
    """The option with this class that is in force."""
    options = [name for name, component in _classes(group).items() if component is owner]
    if len(options) == 1:
        return options[0]
    in_force = list(chosen.options(group, words))
    return next((name for name in in_force if name in options or not options), (options or ["..."])[0])


def _no_option(error: MissingConfigException, words: Sequence[str]) -> str:
    """An option, or an experiment (-cn), that there is not."""
    missing = error.missing_cfg_file or ""
    first, _, path = missing.partition("/")
    if first in PATHS and ("/" in path or Path(path).suffix in FILES):
        kind, name = PATHS[first]
        return f"there is no {first} {path!r}: a {kind} of yours is {first}={name} {first}.path={path}"
    group, _, option = missing.rpartition("/")
    if group and error.options is not None:
        known = sorted(error.options)
        if not option:
            return f"{group}= needs an option: {', '.join(known)}"
        likely = near(option, known)
        tasks = (
            f"; tasks are named by zeroshot.tasks=[{option}], not by zeroshot={option}" if group == "zeroshot" else ""
        )
        more = f" There is {', '.join(known)}" if "mean" in likely else ""
        return f"there is no {group} {option!r}{likely}{more}{tasks}"
    folder = flag(words, "-cd", "--config-dir")
    known = experiments(folder)
    if (name := missing.removeprefix(f"{EXPERIMENTS}/")) in experiments(EXPERIMENTS) and folder != EXPERIMENTS:
        return f"-cn {missing}: experiments lie in a folder, which -cd names: -cd {EXPERIMENTS} -cn {name}"
    hint = near(missing, known) if known else "; -cd FOLDER says where experiments lie"
    more = f" There is {', '.join(known)}" if "mean" in hint else ""
    return f"-cn {missing}: there is no {missing}.yaml in {folder or conf_folder()}{hint}{more}"


def _unresolved(error: InterpolationResolutionError, words: Sequence[str]) -> str:
    """A ${...} without a value, by the word that holds it: other settings may only take their value from that one."""
    who = next((word for word in parted(words)[1] if "${" in word), str(error.full_key))
    why = str(error).partition("\n")[0].rpartition("raised while resolving interpolation: ")[2].strip('"')
    if isinstance(error, InterpolationKeyError):
        return f"{who} refers to a setting that there is not ({why})"
    return f"{who} has no value: {why[:1].lower()}{why[1:]}"


def _wrong_value(error: ValidationError, words: Sequence[str]) -> str:
    key, sentence = str(error.full_key), str(error).partition("\n")[0]
    typed = [m[3] for word in words if (m := SETTING.fullmatch(word)) and m[2] == key]
    value = typed[-1] if typed else None
    got = f", got {value!r}" if value is not None else ""
    if "is not a ListConfig" in sentence:
        return f"{key} takes a list{f': {key}=[{value}]' if value else ''}"
    if value is not None and "is not a subclass of" in sentence:
        return f"{key} is a part by itself, which is chosen with an @: {key.partition('.')[0]}@{key}={value}"
    if "is not Optional" in sentence:
        return f"{key} needs a value: null is none"
    if value is None and ("of type 'dict'" in sentence or "Cannot convert 'dict'" in sentence):
        return f"{key} is one value and has no settings of its own"
    for words_of_it, kind in KINDS:
        if words_of_it in sentence:
            return f"{key} takes {kind}{got or f' ({sentence})'}"
    return f"{key}: {sentence}{got}"


def _composition(sentence: str) -> str | None:
    if given := re.match(r"Ambiguous value for argument '(.*?)'\n", sentence, flags=re.S):
        of_group = given[1].partition("=")[0] in (*GROUPS, METHOD)
        as_list = "" if of_group else ", [...] a list"
        return f"{given[1]} are several values, of which one run takes one: -m makes a sweep of them{as_list}"
    if given := re.match(r"Could not append to config. An item is already at '(.*?)'", sentence):
        return f"{given[1]} is there already: leave out the +"
    if given := re.match(r"Could not delete from config. (.*)", sentence):
        return f"there is nothing to take away (~): {given[1]}"
    if given := re.match(r"Error merging override (~\S+)", sentence):
        return f"{given[1]}: a setting cannot be taken away, only changed"
    if given := re.match(r"Could not override '(.*?)'", sentence):
        return f"there is no {given[1]}: groups are {', '.join([*GROUPS, METHOD])}"
    return None


def _with_equals(word: str) -> str | None:
    """The setting that was meant by metric:wanda, metric.wanda, /metric=wanda, "metric = wanda"; None if none was."""
    match = re.fullmatch(r"/?(\w+)\s*[=:./ ]\s*([\w:.%-]+)", word, flags=re.A)
    if match is None:
        return None
    key, value = match.groups()
    meant = key in SETTINGS or (key in (*GROUPS, METHOD) and value in names(key))
    return f"{key}={value}" if meant else None


def how_to_write(words: Sequence[str]) -> str | None:
    """What to write instead of words that Hydra's grammar refuses; None if all can be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    def reads(word: str) -> bool:
        try:
            OverridesParser.create().parse_override(word)
            return True
        except HydraException:
            return False

    for word in parted(words)[1]:
        if reads(word):
            continue
        if (meant := _with_equals(word)) is not None:
            return f"{word} is no setting: write {meant}"
        key, equals, value = word.partition("=")
        wide = "".join(sign for sign in word if unicodedata.name(sign, "").startswith("FULLWIDTH "))
        if wide and not key.endswith("path") and reads(plain := unicodedata.normalize("NFKC", word)):
            return f"{' '.join(dict.fromkeys(wide))} in {word} is of full width: write {plain}"
        if not equals:
            if word in (*GROUPS, METHOD):
                return f"{word} needs an option: {word}=..., of which --help lists them all"
            if word in SETTINGS:
                return f"{word} is a setting without its value: write {with_value(word)}"
            if word in experiments(flag(words, "-cd", "--config-dir")):
                return f"{word} is no setting: the name of an experiment stands behind -cn, as in -cn {word}"
            return f"{word} is no setting: write {with_group(word)}"
        if (full := ",".join(filter(None, value.split(",")))) != value and full and reads(f"{key}={full}"):
            return f"{word} has a comma without a value beside it: write {key}={full}, and several without spaces"
        if value.startswith("=") and reads(plain := f"{key}={value.lstrip('=')}"):
            return f"{word} has more than one =: write {plain}"
        is_list = value.startswith("[") and value.endswith("]")
        inside = value[1:-1] if is_list else value
        for parts in sorted(([inside], inside.split(",")), key=len, reverse=is_list):  # one value, or several
            texts = ",".join(f'"{part}"' for part in parts)
            better = f"{key}=[{texts}]" if is_list else f"{key}={texts}"
            if reads(better):
                return f"= ~ and other signs in a value need quotes inside quotes: '{better}'"
    return None
