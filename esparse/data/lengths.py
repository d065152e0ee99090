"""How long a sequence is; known before torch is loaded."""

from __future__ import annotations

from esparse.errors import Mistake

DEFAULT_LENGTH = 2048  # the literature's context; a model's own maximum may be 128k, too long for calibration


def sequence_length(asked: int | None, longest: int, setting: str) -> int:
    """The length of a sequence: `asked`, or the smaller of 2048 and the model's `longest`.

    Raises Mistake if the model does not take as many as are asked for; `setting`: what they were asked with.
    """
    if asked is not None and asked > longest:
        raise Mistake(
            f"{setting}={asked} is longer than the {longest} tokens that the model takes: "
            f"set {setting} to at most {longest}, or to null for min({DEFAULT_LENGTH}, {longest})"
        )
    return min(longest, DEFAULT_LENGTH) if asked is None else asked
