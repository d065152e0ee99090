"""esparse: one-shot N:M sparsity of large language models, measured.

    report = esparse.prune(model, tokenizer, "2:4")

`import esparse` loads neither torch nor transformers, and lets transformers load checkpoints that esparse has packed
(`export=packed`).
"""

from typing import TYPE_CHECKING, Any

from esparse.packed import hook as _hook

if TYPE_CHECKING:
    from esparse.api import Report, option, pack, perplexity, prune, register, save

__version__ = "0.2.0"
__all__ = ["Report", "option", "pack", "perplexity", "prune", "register", "save"]

_hook.install()


def __getattr__(name: str) -> Any:
    """The attributes of esparse/api, which loads torch, imported at the first access."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from esparse import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
