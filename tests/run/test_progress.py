"""What is seen of a run: stages by name, the time left, lines in a pipe."""

from __future__ import annotations

import logging

import pytest

from esparse.records.report import LayerReport
from esparse.run import progress
from esparse.run.progress import Progress, clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the lines see, which a test moves on."""
    time = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("esparse").propagate = True
    caplog.set_level(logging.INFO, logger="esparse")
    return caplog


def layer(name: str) -> LayerReport:
    return LayerReport(name, [4, 4], 0.5, 0.8, 0.25, 16, 1.5)


def test_the_bar_knows_the_time_left_from_the_second_step_on_however_slow(now: list[float]) -> None:
    shown = Progress(10)
    shown._bar.get_time = lambda: now[0]
    on_block = shown.evaluating("dense on x")
    (task,) = shown._bar.tasks
    assert task.description == "measuring dense on x, block"
    now[0] += 500
    on_block(0)
    assert task.time_remaining is None
    now[0] += 500  # ten times as long as rich remembers by itself
    on_block(1)
    assert task.time_remaining == 8 * 500


def test_the_run_of_a_sweep_and_the_stage_stand_in_front(now: list[float]) -> None:
    shown = Progress(2, run="run 3 of 6")
    shown.pruning()
    (task,) = shown._bar.tasks
    assert (task.description, task.total) == ("run 3 of 6: pruning, block", 2)
    shown.stage("exporting")
    (task,) = shown._bar.tasks
    assert (task.description, task.total) == ("run 3 of 6: exporting", None)


def test_in_a_pipe_each_block_is_a_line_with_the_time_that_is_left(
    now: list[float], lines: pytest.LogCaptureFixture
) -> None:
    shown = Progress(4)
    shown.pruning()
    now[0] += 10  # the first layer's own time, which says nothing about the blocks that are left
    for block in (1, 1, 2, 2, 3, 3):  # the first one was done by an earlier attempt
        shown.layer(block, layer(f"b{block}"))
        now[0] += 50
    shown.block_done()
    said = [
        record.message.partition("1.5 s; ")[2] or record.message.partition("3.0 s; ")[2] for record in lines.records
    ]
    assert said == ["1:50 elapsed, about 3:20 left", "3:30 elapsed, about 1:40 left", "5:10 elapsed"]
    assert lines.records[0].message.startswith("block 2 of 4: 2 layers, mean relative error 0.250")


def test_a_measurement_says_a_line_in_half_a_minute_at_most(now: list[float], lines: pytest.LogCaptureFixture) -> None:
    on_block = Progress(8).evaluating("pruned on c4")
    for block in range(8):
        now[0] += 20
        on_block(block)
    said = [record.message for record in lines.records]
    assert said[0] == "measuring pruned on c4, block 2 of 8; 0:40 elapsed, about 2:00 left"
    assert said[-1] == "measuring pruned on c4, block 8 of 8; 2:40 elapsed"
    assert len(said) == 4


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_how_a_time_is_written(seconds: float, text: str) -> None:
    assert clock(seconds) == text
