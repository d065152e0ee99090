"""A wheel in an environment of its own, outside the checkout: what `pip install esparse` and its extras give.

The environments hold what pip would install for these extras, linked from the libraries that the tests run with: no
network, and nothing that a library does not ask for itself.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from hashlib import sha256
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from esparse.parts.extras import EXTRAS
from esparse.records import audit
from tests.workshop import ROOT, launch

SMALL = ["calibration.sequences=2", "calibration.length=32", "evaluate.max_tokens=64", "evaluate.length=32"]
METRIC = "metric=entropy"  # masks that do not depend on the rounding of a factorisation, as SparseGPT's do
PARTS = ["esparse", "conf", "hydra_plugins", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without what building left in it, so that nothing is built beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in PARTS:
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", out, source)
    (built,) = out.glob("esparse-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes an environment with the wheel and what these extras bring; returns its folder of programs."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*extras: str) -> Path:
        if extras not in made:
            made[extras] = installed(wheel, extras, tmp_path_factory.mktemp("environment"))
        return made[extras]

    return make


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-index", "--disable-pip-version-check", "-q"]
    subprocess.run(command, check=True, capture_output=True, text=True)


def installed(wheel: Path, extras: tuple[str, ...], folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    libraries = folder / "libraries"
    libraries.mkdir()
    for one in brought([Requirement(f"esparse[{','.join(extras)}]")], wheel):
        for top in {file.parts[0] for file in one.files or () if file.parts[0] != ".."}:
            if not (libraries / top).exists():
                (libraries / top).symlink_to(Path(str(one.locate_file(top))).resolve())
    at = folder / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (at / "libraries.pth").write_text(f"{libraries}\n")
    pip("--python", folder / "venv" / "bin" / "python", "install", "--no-deps", wheel)
    return folder / "venv" / "bin"


def brought(asked: Iterable[Requirement], wheel: Path) -> list[Distribution]:
    """Everything that pip would install beside the wheel itself, as far as it is installed here."""
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        lines = opened.read(metadata).decode().splitlines()
    own = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    found: dict[str, Distribution] = {}
    seen, left = set(), list(asked)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name != "esparse":
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue
        for line in own if name == "esparse" else (found[name].requires or []):
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                left.append(needed)
    return list(found.values())


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["OMP_NUM_THREADS"] = "1"  # more would wait for each other on a busy machine
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def masks(root: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(root.glob("*/masks.safetensors"))}


def test_the_wheel_has_all_that_a_checkout_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    for folder, ending in (("conf", "*.yaml"), ("esparse", "*.py"), ("hydra_plugins", "*.py"), ("esparse/assets", "*")):
        files = [path for path in (ROOT / folder).rglob(ending) if path.is_file() and "conf" not in path.parts[:-3]]
        assert files
        for path in files:
            inside = path.relative_to(ROOT).as_posix()
            assert (f"esparse/{inside}" if folder == "conf" else inside) in names, inside
    assert "esparse/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "experiments", "conf/"))]


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_is_the_same(source: Path, wheel: Path, tmp_path: Path) -> None:
    build = "from setuptools.build_meta import build_sdist; import sys; print(build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as opened:
        opened.extractall(tmp_path / "from", filter="data")
    (unpacked,) = (tmp_path / "from").iterdir()
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, unpacked)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(built) as other:
        assert set(one.namelist()) == set(other.namelist())


@pytest.mark.slow
def test_the_installed_command_prunes_as_launch_py_does(environment: Callable[..., Path], tmp_path: Path) -> None:
    programs = environment("run")
    asked = [*SMALL, METRIC]
    done = run(programs / "esparse", *asked, cwd=tmp_path)  # W&B's offline run included, as it is the default
    assert done.returncode == 0, done.stderr
    launched = launch(*asked, "tracking=none", "output_root=launch", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    assert masks(tmp_path / "outputs") == masks(tmp_path / "launch") != {}


@pytest.mark.slow
def test_a_sweep_and_an_experiment_of_ones_own(environment: Callable[..., Path], tmp_path: Path) -> None:
    """`-cd` finds the user's files, whose defaults find esparse's; a launcher of one's own lies there, too."""
    programs = environment("run")
    own = tmp_path / "mine"
    (own / "hydra" / "launcher").mkdir(parents=True)
    (own / "metric").mkdir()
    (own / "hydra" / "launcher" / "cluster.yaml").write_text("# ours\ndefaults: [a100, _self_]\npartition: short\n")
    (own / "metric" / "sharp.yaml").write_text("# ours\ndefaults: [entropy, _self_]\ngamma: 0.25\n")
    (own / "study.yaml").write_text(
        "# A sweep.\ndefaults:\n  - config\n  - override tracking: none\n  - override evaluate: none\n  - _self_\n"
        "calibration: {sequences: 2, length: 32}\noutput_root: swept\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {metric: 'sharp,wanda'}}}\n"
    )
    done = run(programs / "python", "-m", "esparse", "-cd", "mine", "-cn", "study", "seed=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(masks(tmp_path / "swept")) == 2
    assert "sharp" in done.stdout
    shown = run(
        programs / "esparse", "-cd", own, "hydra/launcher=cluster", "--cfg", "hydra", cwd=tmp_path.parent
    ).stdout
    assert "partition: short" in shown
    assert "gres: gpu:a100:1" in shown


@pytest.mark.tries(1)
@pytest.mark.parametrize(
    ("asked", "package", "extra"),
    [
        (["zeroshot=builtin"], "lm-eval", "eval"),
        (["-m", "hydra/launcher=local"], "submitit", "slurm"),
        (["calibration=c4"], "datasets", "data"),
        (["evaluate=paper"], "pyarrow", "data"),
        (["evaluate=text", "evaluate.path=a.parquet"], "pyarrow", "data"),
    ],
)
def test_what_an_extra_would_install_is_said(
    asked: list[str], package: str, extra: str, environment: Callable[..., Path], tmp_path: Path
) -> None:
    done = run(environment("run") / "esparse", *asked, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"needs {package}, which is not installed: pip install 'esparse[{extra}]'\n" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("outputs/*/result.json"))


@pytest.mark.slow
def test_without_extras_every_command_says_what_it_needs(environment: Callable[..., Path], tmp_path: Path) -> None:
    python = environment() / "python"
    for words in (["-m", "esparse"], ["-m", "esparse", "--help"], ["-m", "esparse.sweep", "status"]):
        done = run(python, *words, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "which is not installed: pip install 'esparse[run]'" in done.stderr
    assert run(python, "-m", "esparse.tables", tmp_path, cwd=tmp_path).returncode == 1  # no record, and no library


IN_PYTHON = """
import sys
import esparse
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoModelForCausalLM, AutoTokenizer
from esparse.models.load import BUILTIN
model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
report = esparse.prune(model, tokenizer, "2:4", metric="entropy", sequences=2, length=32)
print(report)
esparse.save(model, tokenizer, report, "packed", packed=True)
again = AutoModelForCausalLM.from_pretrained("packed")
tokens = tokenizer("The module", return_tensors="pt")
assert (again(**tokens).logits - model(**tokens).logits).abs().max() < 1e-3
assert esparse.pack(model, report) == {}
print(esparse.perplexity(model, tokenizer, max_tokens=64, length=32))
from hashlib import sha256
print({name: sha256(keep.numpy().tobytes()).hexdigest() for name, keep in report.keeps.items()})
for ask in ({"shuffle": "lsa"}, {"calibration": "wikitext2"}):
    try:
        esparse.prune(AutoModelForCausalLM.from_pretrained(BUILTIN), tokenizer, **ask)
    except ValueError as error:
        print(error)
from importlib.metadata import entry_points
[plug_in] = entry_points(group="vllm.general_plugins")
plug_in.load()
loaded = {"vllm", "hydra", "omegaconf", "rich", "wandb", "scipy", "accelerate", "datasets", "numba"} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.slow
def test_the_core_alone_prunes_from_python_and_loads_what_was_packed(
    environment: Callable[..., Path], tmp_path: Path
) -> None:
    """torch, transformers, safetensors, numpy, and what these ask for: all that is in that environment."""
    done = run(environment() / "python", "-c", IN_PYTHON, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, perplexity, masks_in_words, no_scipy, no_pyarrow = done.stdout.splitlines()
    assert float(perplexity) > 1
    assert no_scipy == "shuffle=lsa needs scipy, which is not installed: pip install 'esparse[run]'"
    assert no_pyarrow == "the corpus wikitext2 needs pyarrow, which is not installed: pip install 'esparse[data]'"
    settings = [METRIC, "calibration.sequences=2", "calibration.length=32", "evaluate=none", "tracking=none"]
    launched = run(sys.executable, ROOT / "launch.py", *settings, cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    (record,) = tmp_path.glob("outputs/*/result.json")
    expected = {
        name: sha256(keep.numpy().tobytes()).hexdigest() for name, keep in audit.read_masks(record.parent).items()
    }
    assert ast.literal_eval(masks_in_words) == expected


def test_every_extra_is_known_by_its_name() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert core == {"torch", "transformers", "safetensors", "numpy", "pyyaml", "tqdm"}
    extras = project["optional-dependencies"]
    for package, extra in set(EXTRAS.values()) - {("pyarrow", "data")}:  # which datasets brings
        assert package in {canonicalize_name(Requirement(line).name) for line in extras[extra]}
    of_users = set(extras) - {"dev", "docs", "all", "vllm"}  # vLLM is what serves, and no part of esparse needs it
    named = {Requirement(line).name for extra in of_users for line in extras[extra]} - {"esparse"}
    assert named == {package for package, _ in EXTRAS.values()} - {"pyarrow"}
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.extras | {"track"} == of_users
