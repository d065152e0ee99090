"""What people are told who wrote a setting in a way that Hydra takes for something else, or does not take."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esparse.cli import chosen, registry
from esparse.cli.hydra_errors import how_to_write, unknown_key
from esparse.cli.main import exit_code, log_to_file
from esparse.cli.typed_words import arranged, check, doubled
from esparse.errors import Mistake
from esparse.run.settings import Experiment
from tests.workshop import ROOT, launch


@pytest.mark.parametrize(
    ("words", "better"),
    [
        (["metric=wanda", "model.path=/x/step=1000"], """'model.path="/x/step=1000"'"""),
        (["model.path=~/m"], """'model.path="~/m"'"""),
        (["-m", "calibration.path=/a=1/t.txt,~/u.txt"], """'calibration.path="/a=1/t.txt,~/u.txt"'"""),
        (["model.path=/x/a(b"], """'model.path="/x/a(b"'"""),
        (["-cd", "experiments", "-cn", "ladder", "output_root=/tmp/a=b"], "'output_root=\"/tmp/a=b\"'"),
        (["metric=wanda", "gns"], "gns is no setting: write shuffle=gns"),
        (["nonsense"], "nonsense is no setting: write KEY=VALUE"),
        (["metric"], "metric needs an option"),
        (["tiny"], "tiny is no setting: write model=tiny"),
        (["pattern=2:\uff14"], "\uff14 in pattern=2:\uff14 is of full width: write pattern=2:4"),
        (["metric\uff1dwanda"], "is of full width: write metric=wanda"),
        (["model.path=/m\uff14"], """'model.path="/m\uff14"'"""),
        (["model.skip=[(]"], """'model.skip=["("]'"""),
        (["model.skip=[(,b=c]"], """'model.skip=["(","b=c"]'"""),
        (["pattern=2:4,", "4:8"], "pattern=2:4, has a comma without a value beside it: write pattern=2:4"),
        (["metric==wanda"], "metric==wanda has more than one =: write metric=wanda"),
        (["metric:wanda"], "metric:wanda is no setting: write metric=wanda"),
        (["metric.wanda"], "write metric=wanda"),
        (["/metric=wanda"], "write metric=wanda"),
        (["metric = wanda"], "metric = wanda is no setting: write metric=wanda"),
        (["method/ria"], "write method=ria"),
        (["pattern:2:4"], "write pattern=2:4"),
        (["metric:foo"], "metric:foo is no setting: write KEY=VALUE"),
        (["dry_run"], "dry_run is a setting without its value: write dry_run=true"),
        (["-cd", "experiments", "ladder"], "as in -cn ladder"),
    ],
)
def test_how_to_write_is_said(words: list[str], better: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # experiments/ lies there
    assert better in str(how_to_write(words))


def test_a_log_on_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_file(Path("/dev/full")):
        for _ in range(3):
            logging.getLogger("esparse").warning("a line")
    said = [line for line in capsys.readouterr().err.splitlines() if line != "a line"]
    assert said == ["esparse: cannot write /dev/full: No space left on device"]


@pytest.mark.parametrize("words", [["-cd", "metric=wanda"], ["-m", "metric=glob([w*,m*])", "pattern=2:4,4:8"]])
def test_nothing_is_said_of_what_can_be_read(words: list[str]) -> None:
    assert how_to_write(words) is None


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["metric=wanda", "-m", "seed=0,1"], ["-m"]),
        (["seed=0", "-cd", "experiments", "pattern=4:8", "-cn", "best"], ["-cd", "experiments", "-cn", "best"]),
        (["seed=0", "--info", "pattern=4:8"], ["--info"]),
        (["seed=0", "--info", "defaults", "pattern=4:8"], ["--info", "defaults"]),
        (["seed=0", "--cfg=job"], ["--cfg=job"]),
    ],
)
def test_flags_may_stand_anywhere(words: list[str], flags: list[str]) -> None:
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    assert arranged(words) == [*flags, *settings]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--multirn", "there is no flag --multirn: did you mean --multirun?"),
        ("--metric=wanda", "settings have no dashes: metric=wanda"),
        ("--shuffle", "settings have no dashes: shuffle=OPTION"),
        ("--dry-run", "settings have no dashes: dry_run=true"),
        ("--seed", "settings have no dashes: seed=VALUE"),
        ("--config-path=x", "-cd FOLDER adds one"),
    ],
)
def test_a_flag_that_there_is_not(word: str, said: str) -> None:
    with pytest.raises(Mistake) as error:
        arranged(["seed=1", word])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-cn"], "-cn needs the name of an experiment: -cd experiments -cn NAME; there is ablation, "),
        (["-m", "-cn", "-cd", "experiments"], "-cd experiments -cn NAME; there is ablation, "),
        (["-cd", "-m"], "-cd needs a value behind it: -cd FOLDER"),
        (["--cfg", "jobs"], "--cfg takes job, hydra, all, got 'jobs'"),
        (["-m", "--info"], "-m and --info are different calls: give one of them"),
        (["-cn", "best", "-cn", "real"], "-cn is given twice, and takes one value: leave one out"),
    ],
)
def test_a_flag_without_its_value_or_with_too_many(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Mistake) as error:
        arranged(words)
    assert said in str(error.value)


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("+metric=wanda", "write metric=wanda"),
        ("++method=wanda", "write method=wanda"),
        ("=wanda", "=wanda has no setting in front of its =: write metric=wanda"),
        ("=7", "write KEY=VALUE"),
        ("metric=7", "there is no metric '7'; there is entropy, "),
        ("method.name=wanda", "method.name=wanda: a method has no settings of its own"),
        ("~seed", "~seed: a setting cannot be taken away, only changed"),
        ("~shuffle", "~shuffle: a group cannot be taken away: shuffle=none does nothing"),
        ("~calibration=builtin", "a group cannot be taken away, only changed"),
    ],
)
def test_a_word_that_hydra_would_refuse_in_its_own_words(word: str, said: str) -> None:
    with pytest.raises(Mistake) as error:
        check([word])
    assert said in str(error.value)


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("words", "option"),
    [
        ([], "none"),  # the default
        (["metric=entropy"], "esparse"),
        (["metric=wanda"], "none"),  # no metric implies one
        (["metric=wanda", "shuffle=foldable"], "foldable"),
        (["method=ria"], "lsa"),
        (["-cd", str(ROOT / "experiments"), "-cn", "best", "shuffle.rounds=3"], "esparse"),
        (["-m", "metric=wanda,entropy"], "none esparse"),
    ],
)
def test_the_option_in_force(words: list[str], option: str) -> None:
    registry.register()
    assert list(chosen.options("shuffle", words)) == option.split()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sequences", "did you mean calibration.sequences?"),
        ("path", "did you mean model.path or calibration.path or evaluate.path or export.path?"),
        ("bits", "did you mean quantise.bits?"),
        ("foo", "there is model, calibration, "),
    ],
)
def test_a_setting_without_its_group(key: str, meant: str) -> None:
    assert meant in unknown_key(key, Experiment, [])


@contextmanager
def handled(number: signal.Signals, how: signal.Handlers) -> Iterator[None]:
    """While open, the signal is handled so, whatever the tests' own process was started under (nohup)."""
    before = signal.signal(number, how)
    try:
        yield
        assert signal.getsignal(number) is how
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_and_is_the_exit_code(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unwound = []

    def main() -> None:
        try:
            signal.raise_signal(number)
        except SystemExit:
            unwound.append(number)  # as attempt.py does, which writes status.json then
            raise

    monkeypatch.setattr("sys.argv", ["esparse"])
    with handled(number, signal.SIG_DFL):
        assert exit_code(main) == 128 + number
    assert unwound == [number]
    assert capsys.readouterr().err == f"esparse: ended by {number.name}; finished runs are kept\n"
    with handled(number, signal.SIG_IGN):  # as nohup leaves it
        assert exit_code(lambda: signal.raise_signal(number)) == 0


def test_a_full_disk_behind_standard_output_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.argv", ["esparse"])
    assert exit_code(main) == 1
    assert capsys.readouterr().err == "esparse: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("word", ["hydra.launcher=a100", "hydra.sweeper=basic", "+hydra.launcher=local"])
def test_a_group_of_hydras_with_a_dot(word: str) -> None:
    with pytest.raises(Mistake, match=f"hydra/{word.partition('.')[2]} chooses it"):
        check([word])
    check(["hydra.launcher.timeout_min=5", "hydra/launcher=a100", "hydra.run.dir=x", "seed=1", "method=wanda"])


def test_a_setting_that_is_given_twice() -> None:
    (said,) = doubled(["metric=wanda", "seed=1", "seed=1", "+metric=entropy", "pattern=2:4"])
    assert said == "metric is given twice: +metric=entropy counts, metric=wanda does not"


@pytest.mark.tries(6)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["metric.damb=0.5"], "did you mean metric.damp? metric=sparsegpt takes damp"),
        (
            ["metric=entropy", "metric.gama=0.5"],
            "did you mean metric.gamma? metric=entropy takes base, bins, gamma, limit, range",
        ),
        (["metric=wanda", "metric.gamma=1"], "metric=wanda takes no settings; gamma is a setting of metric=entropy"),
        (["metric=entropy", "metric.alpha=1"], "alpha is a setting of metric=esparse_paper"),
        (["metric=entropy", "metric.alfa=1"], "alpha is a setting of metric=esparse_paper"),
        (
            ["shuffle=esparse", "shuffle.rounds=3"],
            "no setting shuffle.rounds: shuffle=esparse takes block, deal, ",
        ),
        (["METRIC=wanda"], "there is no setting METRIC: did you mean metric?"),
        (["update=refine", "update.first=alps"], "chosen with an @: update@update.first=alps"),
        (["dry_run=A100"], "got 'A100': did you mean a100?"),
        (["dry_run=A100-80"], "got 'A100-80': did you mean a100 or "),
        (["-m", "--resolve"], "--resolve belongs to --cfg: "),
        (["model.revision=main"], "model.path=builtin is on this machine: leave model.revision out"),
        (["pattern=2:4+16:256"], "pattern=2:4 outliers=16:256"),
        (["patern=2:4"], "there is no setting patern: did you mean pattern"),
        (["update=joint", "update.second.frist=1"], "did you mean update.second.first?"),
        (["metric=entropy", "+metric.gama=0.5"], "did you mean metric.gamma?"),
        (["++foo=1"], "there is no setting foo: there is model, "),
        (["+metric.damp=0.5"], "metric.damp is there already: leave out the +"),
        (["~metric.damp"], "a setting cannot be taken away"),
        (["metric=null"], "metric takes one of its options, not null"),
        (["shuffle=null"], "shuffle=none does nothing"),
        (["metric=[wanda,ria]"], "metric takes one option, not a list of them"),
        (["metric="], "metric= needs an option: entropy, "),
        (["method=wandaa"], "there is no method 'wandaa': did you mean wanda?"),
        (["hydra/launcher=a1000"], "there is no hydra/launcher 'a1000': did you mean a100"),
        (["-m", "hydra/launcher=local", "hydra.launcher.wiat=true"], "did you mean hydra.launcher.wait?"),
        (
            ["-cd", "experiments", "-cn", "laddr"],
            "no laddr.yaml in experiments: did you mean ladder? There is ablation",
        ),
        (
            ["-cd", "experiments", "-cn", "real", "method=wanda"],
            "method=wanda is not what would run: real.yaml has metric=magnitude, which wins over it: type metric=wanda",
        ),
        (
            ["-cd", "experiments", "-cn", "best", "method=wanda", "recovery=bias"],
            "best.yaml has metric=entropy shuffle=esparse update=alps_parent, which wins over it: type metric=wanda",
        ),
        (["-cd", "nowhere", "-cn", "ladder"], "-cd nowhere: there is no such folder"),
        (["pattern=2:4,4:8"], "-m makes a sweep of them"),
        (["zeroshot.tasks=hellaswag"], "zeroshot.tasks takes a list: zeroshot.tasks=[hellaswag]"),
        (["seed=null"], "seed needs a value"),
        (["rerun=maybe"], "rerun takes true or false, got 'maybe'"),
        (["model.name=[1]"], "model.name takes a text, got '[1]'"),
        (["metric.damp.x=1"], "metric.damp is one value"),
        (["pattern.n=2"], "pattern is one value and has no settings of its own"),
        (
            ["metric=wanda,ria"],
            "metric=wanda,ria are several values, of which one run takes one: -m makes a sweep of them\n",
        ),
        (["model.name=${foo}"], "model.name=${foo} refers to a setting that there is not"),
        (["output_root=${oc.env:NOT_SET}/x"], "output_root=${oc.env:NOT_SET}/x has no value: environment variable"),
        (["-m", "metric=glob(z*)"], "the sweep has no run: a range(...) or glob(...) in it gives no value"),
        (["-cn", "ladder"], "experiments lie in a folder, which -cd names: -cd experiments -cn ladder"),
        (["model=me/Llama-2-7b"], "a model of yours is model=hf model.path=me/Llama-2-7b"),
        (["calibration=my.txt"], "a text of yours is calibration=text calibration.path=my.txt"),
        (["-m", "output_root=", "seed=1,2"], "output_root must name a folder, got ''"),
        (["model=hf", "model.path="], "model.path must name a model"),
    ],
)
def test_what_hydra_refuses_is_one_sentence_and_no_traceback(words: list[str], said: str) -> None:
    done = launch(*words, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("esparse: ")
    assert all(line.startswith("checking ") for line in before)  # of a sweep of many runs


def test_a_reader_that_has_enough_is_no_error() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, ROOT / "launch.py", "--help"], stdout=writes, stderr=-1, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_setting_given_twice_is_said_and_goes_on() -> None:
    done = launch("metric=wanda", "--cfg", "job", "metric=magnitude", cwd=ROOT)
    assert done.returncode == 0
    assert "metric is given twice: metric=magnitude counts, metric=wanda does not" in done.stderr


def test_the_version() -> None:
    done = launch("--version")
    assert done.stdout.startswith("esparse ") and done.stdout.count("\n") == 1
