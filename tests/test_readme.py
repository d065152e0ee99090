"""Every command that README.md and docs/ tell people to type is carried out: on small settings, or as is named here.

Commands that need a hub, a GPU or a queue are planned (dry_run=true) instead, which composes and checks them whole.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from esparse.jobs import lock
from esparse.packed import memory
from esparse.records.groups import METHOD_GROUPS
from esparse.reports.page import vega
from esparse.sweeps import commands as sweep
from esparse.sweeps.folder import Folder
from tests import forks, test_docs
from tests.attempts import start
from tests.composing import composing
from tests.reports import test_html_page
from tests.reports.test_tables import record, write
from tests.workshop import ROOT, furnished, launch, small_run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Carried out elsewhere: the file that does it, and the words in it by which it can be told.
ELSEWHERE = {
    "python3 -m venv .venv": (".ci/run", "<!-- tests -->"),
    ".venv/bin/pip install -q -e '.[all]'": (".ci/run", "<!-- tests -->"),
    ".venv/bin/pip install -q -e '.[dev]'": (".ci/run", "<!-- tests -->"),
    "python -m pytest -n 0 -k NAME": (".ci/run", "-m pytest"),
    "python experiments/families.py": ("tests/models/test_forward_check.py", "families.py"),
    "wandb sweep sweep.yaml": ("tests/run/test_wandb_agent.py", "agent"),
    "wandb agent ENTITY/PROJECT/ID": ("tests/run/test_wandb_agent.py", "agent"),
    "lm_eval --model hf --model_args pretrained=DIR --tasks builtin --include_path esparse/evaluate/tasks": (
        "tests/evaluate/test_lm_eval_command.py",
        '"-m", "lm_eval"',
    ),
    "python -m esparse.evaluate.lm_eval --model hf --model_args pretrained=DIR --tasks builtin": (
        "tests/evaluate/test_lm_eval_command.py",
        r"python -m esparse\.evaluate\.lm_eval",
    ),
    "python -m esparse.evaluate.lm_eval --model hf": (
        "tests/evaluate/test_lm_eval_command.py",
        r"python -m esparse\.evaluate\.lm_eval",
    ),
    'ESPARSE_VLLM_MODEL=DIR python -m pytest -m vllm -n 0 tests/vllm/test_serving.py -k "test_greedy and float32"': (
        "tests/vllm/conftest.py",
        "ESPARSE_VLLM_MODEL",
    ),
    # Installs esparse from an index: that the extra is known, and what it asks for.
    "pip install 'esparse[vllm]'": ("tests/test_install.py", "test_every_extra_is_known_by_its_name"),
    "vllm serve DIR": ("tests/vllm/test_serving.py", "serve"),
    "pip install --no-deps esparse": (".ci/vllm_environment", "--no-deps"),
    "wandb sync": ("tests/run/test_tracking.py", "wandb sync"),
    "python launch.py model=hf model.path=FILE.gguf": ("tests/models/test_gguf_file.py", "small.gguf"),
    "python docs/settings.py": ("tests/test_site.py", "settings.page()"),
    ". .venv/bin/activate": (".ci/run", "<!-- tests -->"),
    ".venv/bin/python -m pytest": (".ci/run", "<!-- tests -->"),
    ".venv/bin/python -m pytest -m slurm -n 0 tests/slurm": (".ci/run", "pytest -m slurm -n 0 tests/slurm"),
    "python -m esparse": ("tests/test_install.py", '"-m", "esparse"'),
    "python experiments/gpu.py": ("tests/test_gpu_script.py", "experiments"),
    "python experiments/significance.py outputs/real --corpus wikitext2 --against wanda": (
        "tests/test_significance.py",
        "significance.main()",
    ),
    "python launch.py -m metric=power metric.exponent=0.25,0.5,1": ("tests/test_docs.py", "power_example"),
}
# What no test can do: it takes an account on the hub.
NOWHERE = {"hf upload NAME DIR ."}
# Of the commands that prune or plan: the other ones differ in options, each of which is pruned with by
# tests/api/test_every_option.py or composed by tests/test_conf.py.
QUICK = {
    "python launch.py",
    "python launch.py export=dense shuffle.foldable=true",
    "python launch.py model=llama-7b calibration=c4 dry_run=h200",
    "python launch.py -m hydra/launcher=debug metric=wanda,entropy",
}
# What a machine without a GPU, a queue and internet can only plan.
PLANNED = re.compile(r"(?:^| )(?:model=(?!tiny|hf)|bench=|hydra/launcher=|dry_run=)")


def commands(text: str) -> Iterator[str]:
    """Every command of a page in Markdown: lines of shell blocks, and programs between backticks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        yield from filter(None, (part.strip() for part in re.split(r"(?:^|\s)#\s.*", line)[0].split(" && ")))
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    for span in re.findall(r"`([^`]+)`", outside):
        words = " ".join(span.split())
        if re.match(r"(\.venv/bin/)?(python3?|pip|xargs|wandb) \S", words):
            yield words


ALL = sorted(
    {
        command.removeprefix(".venv/bin/") if "launch.py" in command else command
        for page in PAGES
        for command in commands(page.read_text())
    }
)


@dataclass(frozen=True)
class At:
    """Where a command is carried out, and with what."""

    tmp: Path
    workshop: Path
    outputs: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of everything that a table or a picture shows."""
    root = tmp_path_factory.mktemp("outputs")
    published = record("e5", metric="wanda", pruned=11.6)
    published["config"]["model"]["name"] = published["model"]["name"] = "llama-7b"
    published["quality"] = {"wikitext2": {"dense": 5.7, "pruned": 11.6, "tokens": 10, "sequence_length": 2048}}
    alike = [record(run, metric="ria") for run in ("f6", "f7", "f8")]  # but for the shuffle
    for one, shuffle in zip(alike, ("none", "gns", "lbs"), strict=True):
        one["config"]["choices"]["shuffle"] = shuffle
    write(root, published, *alike)
    test_html_page.beside(root)
    return root


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnished(tmp_path_factory.mktemp("workshop"), blocks=2)


def launched(words: list[str], at: At) -> None:
    if "-cn" in words:  # composed there in a process, and run by experiments/laptop.py
        assert words[words.index("-cn") + 1] in {path.stem for path in test_docs.EXPERIMENTS}
    elif "--help" in words:
        assert "one-shot N:M sparsity" in launch("--help").stdout
    else:
        run(words, at)


def run(words: list[str], at: At) -> None:
    """`python launch.py`, in processes that have imported all there is to import: a second or less each."""
    planned = PLANNED.search(" ".join(words))
    (at.tmp / "there").mkdir()
    if any(word == "export.path=DIR" for word in words):
        (at.tmp / "there").rmdir()  # a checkpoint is not written over what is there
    there = {"NAME_OR_DIR": at.workshop / "model", "FILE": at.workshop / "text.txt", "DIR": at.tmp / "there"}
    for name, path in there.items():
        words = [word.replace(f"={name}", f"={path}") for word in words]
    queue = [word for word in words if word.startswith("hydra/launcher=")]
    if queue:  # what only a cluster can do: tests/slurm
        assert "Slurm" in composed(*queue).hydra.launcher._target_
    asked = [word for word in words if word != "-m" and not word.startswith("hydra")]
    parsed = OverridesParser.create().parse_overrides(asked)
    jobs = BasicSweeper.split_arguments(parsed, None)[0] if "-m" in words else [asked]
    named = {word.partition("=")[0] for word in asked}
    small = [*small_run(at.workshop, at.tmp / "out"), *(["zeroshot.limit=2"] if "zeroshot" in named else [])]
    extra = ["dry_run=true", f"output_root={at.tmp / 'out'}"] if planned else small
    for job in jobs:
        narrow = ["quantise.group=null"] if "quantise=int4" in job else []  # the small model is narrower than a group
        process = start([*(word for word in extra if word.partition("=")[0] not in named), *narrow, *job])
        process.join()
        assert process.exitcode == 0, job
    assert len(list(at.tmp.glob("out/*/result.json"))) == (0 if planned else len(jobs))


def composed(*overrides: str) -> Any:
    with composing():
        return compose("config", list(overrides), return_hydra_config=True)


def tabled(words: list[str], at: At) -> None:
    module, *arguments = words
    places = [str(at.outputs) if word == "outputs" else word for word in arguments]
    out = None
    if "--out" in places:
        out = at.tmp / places[places.index("--out") + 1]
        places[places.index("--out") + 1] = str(out)
    assert importlib.import_module(module).main(places) == 0
    said = at.capsys.readouterr()
    assert said.err == "" or (str(out).endswith(".html") and vega.library() is None)  # which is said
    if out is None:
        assert said.out.count("\n| ") >= 3
    else:
        assert out.stat().st_size > (300 if out.suffix == ".tex" else 5000)


def swept(words: list[str], at: At) -> None:
    folder = submitted(at.tmp)
    arguments = [str(folder) if word in ("SWEEP", "outputs/sweeps/NAME") else word for word in words]
    seen: list[Folder] = []
    at.monkeypatch.setattr(sweep, "submit_and_say", lambda changed, chosen: seen.append(changed))
    if len(arguments) == 1:
        arguments.append(str(folder))
    if arguments[0] == "release":  # a run that waits in a queue which is not this machine's
        run = at.tmp / "1a2b3c4d"
        run.mkdir()
        lock.put(run, replace(lock.Owner.this_process("queued"), job="8123_4", cluster="elsewhere", machine="another"))
        arguments[1] = str(run)
    assert sweep.main(arguments) == (1 if arguments[0] == "status" else 0)  # one run has failed
    if "mem_gb=200" in arguments:
        assert [changed.launcher["mem_gb"] for changed in seen] == [200]


def submitted(root: Path) -> Path:
    """The folder of a sweep on Slurm, whose only run has failed."""
    config = {"output_root": str(root / "out"), "pattern": "2:4", "outliers": None, "model": {"name": "tiny"}}
    config["choices"] = dict.fromkeys(METHOD_GROUPS, "none")
    settings: Any = OmegaConf.to_container(composed("hydra/launcher=site").hydra.launcher, resolve=True)
    settings.pop("_target_")
    folder = Folder.create(root / "out" / "sweeps" / "NAME", "slurm", settings, [config])
    folder.runs[0].folder.mkdir(parents=True)
    (folder.runs[0].folder / "status.json").write_text('{"status": "failed", "reason": "made for a test"}')
    return folder.path


def counted(words: list[str], at: At) -> None:
    assert memory.main([str(at.workshop / "model") if word == "NAME_OR_DIR" else word for word in words]) == 0


def edited(words: list[str], at: At) -> None:
    assert (ROOT / "conf" / words[0].removeprefix("~/.config/esparse/")).is_file()


def copied(words: list[str], at: At) -> None:
    at.monkeypatch.setenv("HOME", str(at.tmp))
    subprocess.run(["install", "-D", *(str(Path(word).expanduser()) for word in words)], cwd=ROOT, check=True)
    (copy,) = (at.tmp / ".config" / "esparse").rglob("*.yaml")
    assert copy.read_text() == (ROOT / words[0]).read_text()


def studied(words: list[str], at: At) -> None:
    done = forks.run(ROOT / "experiments" / "metric_study.py", "report", *(ROOT / word for word in words))
    assert done.returncode == 0, done.stderr
    assert "| wanda | 9" in done.stdout and "| wanda | 6" in done.stdout  # without a shuffle, and with one


# What carries a command out, by how it begins; it gets the rest.
BY: dict[str, Callable[[list[str], At], None]] = {
    r"python launch\.py": launched,
    r"python -m(?= esparse\.(?:tables|published) )": tabled,
    r"python -m esparse\.sweep(?= )": swept,
    r"python -m esparse\.packed\.memory(?: |$)": counted,
    r"python experiments/metric_study\.py report ": studied,
    r"\$EDITOR": edited,
    r"install -D ": copied,
}


def who_carries_out(command: str) -> tuple[Callable[[list[str], At], None], list[str]]:
    for begins, carry_out in BY.items():
        if match := re.match(begins, command):
            return carry_out, shlex.split(command[match.end() :])
    raise LookupError(
        f"README.md or docs/ tell people to type {command!r}, and no test carries it out: see BY and ELSEWHERE"
    )


@pytest.fixture
def at(
    tmp_path: Path,
    workshop: Path,
    outputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> At:
    return At(tmp_path, workshop, outputs, monkeypatch, capsys)


def how_long(command: str) -> Any:
    """As a case of a test: a command that prunes takes a second for each run, and the plan of a large model longer."""
    runs = re.match(r"python launch\.py(?! --help| -cd )", command)
    return pytest.param(command, marks=pytest.mark.slow if runs and command not in QUICK else ())


@pytest.mark.parametrize("command", [how_long(command) for command in ALL if command not in ELSEWHERE.keys() | NOWHERE])
def test_a_command_works(command: str, at: At) -> None:
    carry_out, words = who_carries_out(command)
    carry_out(words, at)


@pytest.mark.parametrize("command", ELSEWHERE)
def test_a_command_is_carried_out_elsewhere(command: str) -> None:
    file, words = ELSEWHERE[command]
    assert command in ALL, "no page has it any more"
    assert words in (ROOT / file).read_text()


def test_commands_are_found() -> None:
    page = "```bash\na b && c  # said\nd#e \\\n  f\n```\n`python x\n y` `python` `pattern=2:4`\n```python\nno\n```\n"
    assert list(commands(page)) == ["a b", "c", "d#e    f", "python x y"]
    assert len(ALL) > 35


def test_a_new_command_needs_a_test() -> None:
    for command in ("python -m esparse.nothing outputs", "make all", "python experiments/new.py"):
        with pytest.raises(LookupError, match="no test carries it out"):
            who_carries_out(command)
