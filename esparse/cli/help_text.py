"""What --help says of the groups: the options that Hydra finds, in the order and with the notes of the registry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from esparse.records.groups import GROUPS, Group

WIDTH = 120
# Sets several groups as the authors of a method do, and is therefore none of GROUPS.
METHODS = {
    "method": Group(
        options={},
        notes={
            "esparse": "as in the paper",
            **dict.fromkeys(("magnitude", "wanda", "sparsegpt"), ""),
            "ria": "with its permutation",
            **dict.fromkeys(("nowag", "gblm", "owl", "admm", "alps"), ""),
            "ebft": "on Wanda's mask",
            "eight_sixteen": "8:16+16:256 and all repairs",
            "best": "ours; a method sets six groups, and later options on the command line change single ones",
        },
    )
}
INDENT, NAMES = 2, 16  # columns in front of a group's name, and in front of its options


def register() -> None:
    """Lets conf/hydra/help/esparse.yaml write ${esparse_groups:} for the lines of all groups."""
    OmegaConf.register_new_resolver("esparse_groups", _groups, replace=True)


def _groups() -> str:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    find = hydra.config_loader.get_group_options
    return "\n".join(lines(name, group, find(name)) for name, group in (METHODS | GROUPS).items())


def lines(name: str, group: Group, found: Sequence[str]) -> str:
    """One group: the options that it names, in its order, then all others that a search path or a package adds."""
    known = [option for option in (*group.options, *group.notes) if option in found]
    options = list(dict.fromkeys([*known, *sorted(found, key=_natural)]))
    texts = [f"{option} ({note})" if (note := group.notes.get(option)) else option for option in options]
    whole = [f"{'':{INDENT}}{name + '=':{NAMES - INDENT}}{texts[0]}"]
    for text in texts[1:]:  # a line ends between two options only
        if len(whole[-1]) + len(text) + 3 > WIDTH:
            whole.append(" " * NAMES + f"| {text}")
        else:
            whole[-1] += f" | {text}"
    return "\n".join(whole)


def _natural(option: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", option)]


@contextmanager
def store_not_copied() -> Iterator[None]:
    """Within it Hydra only reads its store of schemas: else it copies the whole store to read one group.

    Hydra has no setting for that, so that a method of its class is changed, for as long as esparse is at work.
    """
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del ConfigStore.__deepcopy__  # type: ignore[attr-defined]
