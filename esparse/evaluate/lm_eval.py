"""lm-eval's own command for packed checkpoints:

    python -m esparse.evaluate.lm_eval --model hf --model_args pretrained=DIR --tasks builtin

All arguments are lm-eval's. Run as a part of esparse, transformers knows the packed format, and lm-eval knows the task
`builtin`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb

from esparse.errors import Mistake
from esparse.evaluate.tasks import FOLDER
from esparse.models.model_name import check_absent
from esparse.parts.extras import explained

OTHERS = ("ls", "validate")  # commands of lm-eval that evaluate nothing


def arguments(typed: Sequence[str]) -> list[str]:
    """What was typed, and esparse's folder of tasks, unless another one is named or lm-eval only shows its help."""
    names_one = any(word.partition("=")[0] == "--include_path" for word in typed)
    return list(typed) if names_one or len(typed) < 2 else [*typed, "--include_path", str(FOLDER)]


def check(typed: Sequence[str]) -> None:
    """Raises Mistake or OSError for a checkpoint that is missing, of which lm-eval has nothing but a traceback."""
    asks_for_help = {"-h", "--help"} & set(typed)
    elsewhere = any(word.startswith(("--conf", "-C")) for word in typed)
    if len(typed) < 2 or typed[0] in OTHERS or asks_for_help or elsewhere:
        return
    named_model = any(re.match(r"--model(=|$)|-M", word) for word in typed)
    if (not named_model or {"hf", "--model=hf", "-Mhf"} & set(typed)) and "pretrained" not in " ".join(typed):
        raise Mistake("lm-eval is to be told which checkpoint to load: --model hf --model_args pretrained=DIR")
    for word in typed:
        if (found := re.search(r"\bpretrained=([^,]+)", word)) and not Path(found[1]).exists():
            check_absent(found[1], "--model_args pretrained")


def main() -> int:
    typed = sys.argv[1:]
    try:
        check(typed)
        from lm_eval.__main__ import cli_evaluate

        sys.argv[1:] = arguments(typed)
        cli_evaluate()
    except (ValueError, OSError) as error:
        *_, (raised_in, _) = walk_tb(error.__traceback__)
        if not isinstance(error, Mistake) and not raised_in.f_globals["__name__"].startswith(("lm_eval", "esparse")):
            raise  # of another library, whose traceback says more
        print(f"esparse: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(explained(main, program="lm-eval's command"))
