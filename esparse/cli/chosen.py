"""The options that typed words choose, when a wrong setting among them keeps Hydra from composing all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from esparse.cli.typed_words import METHOD, SETTING, flag, parted
from esparse.parts.conf_folder import conf_folder
from esparse.records.groups import GROUPS

MOST = 16  # combinations of a sweep's options that are looked at


def options(group: str, words: Sequence[str]) -> Iterator[str]:
    """The option of a group that is in force: typed, implied, or a default; of a sweep several may be."""
    typed = [match for word in parted(words)[1] if (match := SETTING.fullmatch(word))]
    swept = [
        [f"{match[2]}={option}" for option in match[3].split(",")] for match in typed if match[2] in (*GROUPS, METHOD)
    ]
    folder = flag(words, "-cd", "--config-dir")
    path = create_config_search_path(str(conf_folder()))
    if folder:
        path.prepend("command-line", str(Path(folder).absolute()))
    loader = ConfigLoaderImpl(config_search_path=path)
    for overrides in islice(product(*swept), MOST):
        try:
            config = loader.load_configuration(
                flag(words, "-cn", "--config-name") or "config", list(overrides), RunMode.RUN
            )
        except (HydraException, OmegaConfBaseException):
            continue
        if (option := config.hydra.runtime.choices.get(group)) is not None:
            yield str(option)
