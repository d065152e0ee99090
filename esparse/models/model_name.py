"""What a model may be called: a directory, a GGUF file, or a name on the Hugging Face hub.

Standard library only: it is looked at before torch is loaded.
"""

from __future__ import annotations

import re

from esparse.errors import Mistake
from esparse.models import gguf_file


def check_absent(name: str, who: str) -> None:
    """Checks a name under which nothing lies on this machine: it must be the hub's, not a path.

    Raises FileNotFoundError for a path, Mistake for what is neither.
    """
    kind = "file" if gguf_file.is_named(name) else "directory"
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or kind == "file":
        raise FileNotFoundError(f"{who}: there is no {kind} {name}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise Mistake(f"{who}: {name} is neither a directory nor a name on the Hugging Face hub")
