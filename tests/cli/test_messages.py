"""What people are told who wrote a setting in a way that Hydra takes for something else."""

from __future__ import annotations

import pytest

from esparse.cli.messages import say_how_to_write, wrong_word


@pytest.mark.parametrize(
    ("words", "better"),
    [
        (["metric=wanda", "model.path=/x/step=1000"], """'model.path="/x/step=1000"'"""),
        (["model.path=~/m"], """'model.path="~/m"'"""),
        (["-m", "calibration.path=/a=1/t.txt,~/u.txt"], """'calibration.path="/a=1/t.txt,~/u.txt"'"""),
        (["model.path=/x/a(b"], """'model.path="/x/a(b"'"""),
    ],
)
def test_how_to_quote_is_said(words: list[str], better: str, capsys: pytest.CaptureFixture[str]) -> None:
    say_how_to_write(words)
    said = capsys.readouterr().err
    assert said.count("esparse: ") == 1 and better in said


@pytest.mark.parametrize("words", [["-cd", "x", "metric=wanda"], ["-m", "metric=glob([w*,m*])", "pattern=2:4,4:8"]])
def test_nothing_is_said_of_what_can_be_read(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    say_how_to_write(words)
    assert capsys.readouterr().err == ""


def test_an_override_in_front_of_m(capsys: pytest.CaptureFixture[str]) -> None:
    say_how_to_write(["metric=wanda", "-m", "seed=0,1"])
    assert "-m stands in front of all settings" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["hydra.launcher=a100", "hydra.sweeper=basic", "+hydra.launcher=local"])
def test_a_group_of_hydras_with_a_dot(word: str) -> None:
    assert f"hydra/{word.partition('.')[2]} chooses it" in str(wrong_word([word]))
    assert wrong_word(["hydra.launcher.timeout_min=5", "hydra/launcher=a100", "hydra.run.dir=x", "seed=1"]) is None
