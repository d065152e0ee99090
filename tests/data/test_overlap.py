"""A text that was calibrated on is not what a method is measured on without a word."""

from __future__ import annotations

import logging

import pytest
import torch

from esparse.data.overlap import _runs, warn_if_shared
from esparse.data.tokens import windows

STREAM_T = torch.randint(0, 1024, (4096,), generator=torch.Generator().manual_seed(1))
OTHER_T = torch.randint(0, 1024, (4096,), generator=torch.Generator().manual_seed(2))


def cut(start: int, length: int = 64, count: int = 8) -> torch.Tensor:
    return STREAM_T[start : start + count * length].view(count, length)


@pytest.mark.parametrize(
    ("calibration", "evaluation", "said"),
    [
        (
            cut(0),
            windows(STREAM_T, 64),
            "100 % of the calibration is in the evaluation text a.txt, and 12 % of",
        ),
        (cut(5), windows(STREAM_T, 128), "of the calibration is in the evaluation text a.txt"),  # begins elsewhere
        (
            windows(STREAM_T, 64),
            cut(0),
            "12 % of the calibration is in the evaluation text a.txt, and 100 % of",
        ),
        (cut(0, length=8), cut(0, length=16), "100 % of the calibration"),  # sequences shorter than a run
        (cut(0), windows(OTHER_T, 64), None),
        (cut(0, length=1), cut(0, length=2), None),  # any two texts share single tokens
        (torch.cat([cut(0)] + [windows(OTHER_T, 64)[:32]] * 8), windows(STREAM_T, 64)[40:], None),
    ],
)
def test_text_that_was_calibrated_on_is_told(
    calibration: torch.Tensor, evaluation: torch.Tensor, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "esparse"):
        warn_if_shared("a.txt", calibration, evaluation)
    assert said in caplog.text if said else not caplog.text


def test_runs_have_the_numbers_of_their_tokens_alone() -> None:
    tokens_SL = torch.randint(0, 3, (6, 40), generator=torch.Generator().manual_seed(3))
    of_run: dict[int, set[tuple[int, ...]]] = {}
    for row, numbers in zip(tokens_SL.tolist(), _runs(tokens_SL, 4).view(6, -1).tolist(), strict=True):
        for place, number in enumerate(numbers):
            of_run.setdefault(number, set()).add(tuple(row[place : place + 4]))
    assert all(len(runs) == 1 for runs in of_run.values())
    assert len(of_run) == len({run for runs in of_run.values() for run in runs})
