"""lm-eval's own command for packed checkpoints:

    python -m esparse.evaluate.lm_eval --model hf --model_args pretrained=DIR --tasks builtin

All arguments are lm-eval's. Run as a part of esparse, transformers knows the packed format, and lm-eval knows the task
`builtin`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from esparse.evaluate.tasks import FOLDER
from esparse.parts.extras import explained


def arguments(typed: Sequence[str]) -> list[str]:
    """What was typed, and esparse's folder of tasks, unless another one is named or lm-eval only shows its help."""
    names_one = any(word.partition("=")[0] == "--include_path" for word in typed)
    return list(typed) if names_one or len(typed) < 2 else [*typed, "--include_path", str(FOLDER)]


def main() -> int:
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = arguments(sys.argv[1:])
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(explained(main, program="lm-eval's command"))
