"""Single files of data sets on the Hugging Face Hub, from the local cache if they are in it.

Files are fetched one by one rather than by `load_dataset(name, data_files=...)`, because that finds nothing in its
cache when the hub cannot be reached (huggingface/datasets#6837). Both share the hub's cache of files, so a file fetched
by one is there for the other. A cached file is used without asking the hub, because these data sets do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_S = 10.0  # the hub counts as unreachable if it has not answered after this time


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file on the hub."""

    repo: str
    file: str
    revision: str = "main"

    def local(self, instead: str) -> Path:
        """The path of the file on this machine, downloaded if it is not cached.

        Raises ConnectionError (at once under HF_HUB_OFFLINE=1, else within seconds) if the file is not cached and
        cannot be fetched; `instead`: what its message suggests as a replacement.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

        kind, revision = "dataset", self.revision
        cached = try_to_load_from_cache(self.repo, self.file, repo_type=kind, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        try:
            # Asks once without retries; the download would retry for half a minute or more.
            url = hf_hub_url(self.repo, self.file, repo_type=kind, revision=revision)
            get_hf_file_metadata(url, timeout=ANSWER_S)
            return Path(hf_hub_download(self.repo, self.file, repo_type=kind, revision=revision))
        except Exception as cause:  # hub, client and network raise many unrelated types
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
            raise ConnectionError(
                f"the data set {self.repo} (file {self.file}) is not in the local Hugging Face cache and could not be "
                f"fetched ({reason}): fetch it on a machine that reaches the hub (`{self._command()}`), "
                f"or use {instead}"
            ) from cause

    def _command(self) -> str:
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"hf download --repo-type dataset{revision} {self.repo} {self.file}"


@contextmanager
def from_cache_where_out_of_reach() -> Iterator[None]:
    """While open, `datasets` uses only its cache if the hub does not answer; it would retry for half a minute."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    modules: list[Any] = [datasets.config, constants]
    asked = [(settings, settings.HF_HUB_OFFLINE) for settings in modules]
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_S)
    except Exception:  # of the client's many types
        for settings, _ in asked:
            settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for settings, offline in asked:
            settings.HF_HUB_OFFLINE = offline
