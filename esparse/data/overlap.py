"""Whether the text that a model is measured on is, in part, the text that it was calibrated on.

Shapes: S sequences or W windows, L tokens of each; R runs of consecutive tokens.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger("esparse")

RUN = 32  # tokens: so many in a row are in two texts only if one was copied
SHORT = 8  # any two texts have shorter runs in common
LARGE = 0.05  # share of the runs: less may be licences and headings
FACTOR = 6364136223846793005  # odd and large, so that runs have other numbers


def warn_if_shared(name: str, tokens_SL: Tensor, windows_WL: Tensor) -> None:
    """Logs a warning if much of the calibration is in the evaluation text of this name, or the other way round."""
    run = min(RUN, tokens_SL.shape[1], windows_WL.shape[1])
    if run < SHORT:
        return
    ours_R, theirs_R = _runs(tokens_SL, run), _runs(windows_WL, run)
    of_ours = float(torch.isin(ours_R, theirs_R).double().mean())
    of_theirs = float(torch.isin(theirs_R, ours_R).double().mean())
    if max(of_ours, of_theirs) > LARGE:
        log.warning(
            "%.0f %% of the calibration is in the evaluation text %s, and %.0f %% of what is measured of that was "
            "calibrated on: a perplexity on text that the method has seen says too little, so give one of the two "
            "another text",
            100 * of_ours,
            name,
            100 * of_theirs,
        )


def _runs(tokens_SL: Tensor, run: int) -> Tensor:
    """A number for every run of so many tokens in a sequence; runs of the same tokens have the same number."""
    count = tokens_SL.shape[1] - run + 1
    numbers_SN = torch.zeros(len(tokens_SL), count, dtype=torch.int64)
    for place in range(run):
        numbers_SN = numbers_SN * FACTOR + tokens_SL[:, place : place + count]  # overflows, and wraps
    return numbers_SN.flatten()
