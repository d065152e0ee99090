"""The words that were typed, before Hydra sees them: flags and settings in any order, and what Hydra would let pass."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from esparse.errors import Mistake
from esparse.parts.numbers import near
from esparse.records.groups import GROUPS

SETTING = re.compile(r"([+~]{0,2})([\w./@:-]+)=(.*)", flags=re.S)
# Groups of Hydra's own, which are chosen with a slash: a dot would put a text in place of their settings.
HYDRAS = "launcher|sweeper|job_logging|hydra_logging|help|hydra_help|output|env"
METHOD = "method"


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
        flags.append(word)
        if has_value or action.nargs == 0 or not rest or rest[0].startswith("-"):
            continue
        if action.nargs is None or "=" not in rest[0]:  # --info takes a word, or none
            flags.append(rest.pop(0))
    return flags, settings


def _no_flag(word: str, known: list[str]) -> str:
    name, equals, value = word.lstrip("-").partition("=")
    if name.partition(".")[0] in (*GROUPS, METHOD) or equals:
        return f"settings have no dashes: {name}={value or 'OPTION'} in place of {word}"
    return f"there is no flag {word}{near(word, known)}"


def check(words: Sequence[str]) -> None:
    """Raises Mistake for a setting that Hydra would misread, or refuse in its own words."""
    for word in words:
        if given := re.fullmatch(rf"(\+{{0,2}})hydra\.({HYDRAS})=(\w.*)", word):
            raise Mistake(f"hydra/{given[2]}={given[3]} chooses it, with a slash; {word} would change nothing")
        match = SETTING.fullmatch(word)
        if match is None or match[2] not in (*GROUPS, METHOD):
            continue
        group, option = match[2], match[3]
        if option.startswith("[") and "," in option:
            tasks = f"; tasks are named by zeroshot.tasks={option}" if group == "zeroshot" else ""
            raise Mistake(f"{group} takes one option, not a list of them; -m {group}=A,B makes a sweep{tasks}")
        if option in ("null", "~") and group != METHOD:
            neutral = GROUPS[group].neutral
            other = f": {group}={neutral} does nothing" if neutral else " (--help lists them)"
            raise Mistake(f"{group} takes one of its options, not {option}{other}")


def in_hydras_words(words: Sequence[str]) -> list[str]:
    """method=null asks for none, which Hydra has no word for; dry_run.device=a100 is dry_run=a100."""
    kept = [word for word in words if word not in ("method=null", "method=none")]
    return [re.sub(r"^dry_run\.device=", "dry_run=", word) for word in kept]


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
