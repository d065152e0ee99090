"""esparse: one-shot N:M sparsity of large language models, measured.

Importing it lets transformers load checkpoints that esparse has packed (`export=packed`).
"""

from esparse.packed import hook as _hook

__version__ = "0.2.0"

_hook.install()
