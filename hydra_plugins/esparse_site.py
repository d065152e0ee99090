"""Lets a folder of one's own stand in front of esparse's configuration: $ESPARSE_CONF, or ~/.config/esparse.

What lies there replaces the file of the same name in conf/ (for instance hydra/launcher/site.yaml) or adds an option.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.plugins.search_path_plugin import SearchPathPlugin


class Site(SearchPathPlugin):
    """Only for esparse's own commands: another Hydra program of the same environment has other configuration."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from esparse.parts.conf_folder import conf_folder, own_folder

        folder = own_folder()
        paths = [str(entry.path).removeprefix("file://").rstrip("/") for entry in search_path.get_path()]
        if folder is not None and str(conf_folder()) in paths:
            search_path.prepend(provider="site", path=f"file://{folder}", anchor=SearchPathQuery(provider="main"))
