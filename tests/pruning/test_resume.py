"""A run that is stopped at any moment goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from esparse.models.load import BUILTIN
from esparse.pruning.journal import Dense, Journal
from tests.attempts import killed_when, start
from tests.models.families import MORE
from tests.workshop import ROOT, furnished, small_run

BLOCKS = 4
FILES = ("masks", "orders", "calibration_tokens", "window_losses", "channels")
# Between them: both stores, hidden states written after every block and never, a stream of the dense model, prepared
# blocks, biases that layers get, gradients and densities that are measured before the first block is pruned.
SHARED_KEYS = "keys of earlier blocks"
METHODS = {
    "shards": ["model.store=shards", "shuffle=esparse", "update=obs", "snapshot_seconds=0", "profile=true"],
    "dense stream": ["prepare=equalise", "recovery=window", "recovery.epochs=1", "snapshot_seconds=null"],
    "biases": [
        "pattern=8:16",
        "model.store=shards",
        "prepare=equalise",
        "recovery=bias",
        "allocation=owl",
        "snapshot_seconds=null",
    ],
    "snapshots": ["metric=gradient", "metric.source=model", "recovery=window_parent", "snapshot_seconds=0"],
    # Blocks 2 and 3 read keys of blocks 0 and 1, which a snapshot has to hold for each stream.
    SHARED_KEYS: ["recovery=window_parent", "recovery.epochs=1", "snapshot_seconds=0"],
}


@dataclass
class Undisturbed:
    """A run that nobody killed."""

    overrides: list[str]
    folder: Path
    touches: int  # how often it touched a file of its own
    seconds: float


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnished(tmp_path_factory.mktemp("workshop"), blocks=BLOCKS)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "biases"]


@pytest.fixture(scope="module", params=["biases", *OTHERS])
def undisturbed(request: pytest.FixtureRequest, workshop: Path) -> Undisturbed:
    out = workshop / request.param.replace(" ", "-")
    overrides = small_run(workshop, out) + METHODS[request.param]
    if request.param == SHARED_KEYS:
        overrides.append(f"model.path={with_shared_keys(workshop / 'shared')}")
    process = start([*overrides, f"output_root={out / 'first'}"])  # warms up what the server has not loaded yet
    process.join()
    begun = time.monotonic()
    process = start(overrides, counted=workshop / "count")
    process.join()
    assert process.exitcode == 0
    (folder,) = (f.parent for f in out.glob("*/result.json"))
    return Undisturbed(overrides, folder, int((workshop / "count").read_text()), time.monotonic() - begun)


def with_shared_keys(folder: Path) -> Path:
    torch.manual_seed(0)
    _, settings = MORE["gemma4"]
    settings = settings | {"vocab_size": 1024, "vocab_size_per_layer_input": 1024}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **settings)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    return folder


def finish(undisturbed: Undisturbed, out: Path) -> list[int]:
    """Attempts the run once more, undisturbed; the blocks with which attempts began behind the first."""
    process = start([*undisturbed.overrides, f"output_root={out}"])
    process.join()
    (folder,) = (f.parent for f in out.glob("*/result.json"))
    for name in (f"{file}.safetensors" for file in FILES):
        if (undisturbed.folder / name).exists() or (folder / name).exists():
            assert (folder / name).read_bytes() == (undisturbed.folder / name).read_bytes(), name
    record, expected = (json.loads((f / "result.json").read_text()) for f in (folder, undisturbed.folder))
    for same in ("id", "quality", "sparsity", "model"):
        assert record[same] == expected[same]
    for part in ("layers", "recovery"):
        without_seconds = [[{**row, "seconds": 0} for row in r[part]] for r in (record, expected)]
        assert without_seconds[0] == without_seconds[1]
    assert sorted(f.name for f in folder.iterdir()) == sorted(f.name for f in undisturbed.folder.iterdir())
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    return record["resumed"]


def killed(undisturbed: Undisturbed, out: Path, kills: int, attempt: Callable[[], bool]) -> None:
    """Kills attempts until that many were killed, and lets the run end; one that was not killed in time begins anew."""
    while kills:
        kills -= attempt()
        if list(out.glob("*/result.json")):
            finish(undisturbed, out)
            shutil.rmtree(out)
    finish(undisturbed, out)


@pytest.mark.slow
def test_killed_whenever_a_file_is_touched(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """At moments drawn among all touches of files: drafts, moves, removals."""
    draw = random.Random(undisturbed.touches)
    assert undisturbed.touches > 6 * BLOCKS

    def attempt() -> bool:
        moment = draw.randint(1, undisturbed.touches)
        process = start([*undisturbed.overrides, f"output_root={tmp_path}"], kill_at=moment)
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        return process.exitcode == -signal.SIGKILL

    killed(undisturbed, tmp_path, 3, attempt)


@pytest.mark.slow
def test_killed_at_any_time(undisturbed: Undisturbed, tmp_path: Path) -> None:
    draw = random.Random(1)

    def attempt() -> bool:
        moment = time.monotonic() + draw.random() * undisturbed.seconds
        process = start([*undisturbed.overrides, f"output_root={tmp_path}"])
        return killed_when(process, lambda: time.monotonic() > moment)

    killed(undisturbed, tmp_path, 3, attempt)


@pytest.mark.tries(1)
@pytest.mark.parametrize(
    ("written", "goes_on_at"), [("pruned-00001", 1), ("done-00002", 2), ("result", BLOCKS)], ids=str
)
def test_killed_while_a_file_is_being_written(
    undisturbed: Undisturbed, tmp_path: Path, written: str, goes_on_at: int
) -> None:
    for _ in range(20):  # a draft is there for milliseconds, and this process may be asleep then
        process = start([*undisturbed.overrides, f"output_root={tmp_path}"])
        in_time = killed_when(process, lambda: bool(list(tmp_path.rglob(f"{written}*.part"))))
        if in_time and list(tmp_path.rglob(f"{written}*.part")):
            assert finish(undisturbed, tmp_path) == [goes_on_at]
            return
        shutil.rmtree(tmp_path)
    raise AssertionError(f"no attempt was killed while it wrote {written}")


@pytest.mark.slow
def test_another_text_begins_anew(workshop: Path, tmp_path: Path) -> None:
    """What was pruned with other calibration tokens must not be mixed with what comes."""
    text = tmp_path / "text.txt"
    shutil.copy(workshop / "text.txt", text)
    overrides = [*small_run(workshop, tmp_path / "out"), f"calibration.path={text}"]
    process = start(overrides)
    assert killed_when(process, lambda: bool(list(tmp_path.rglob("done-00001*"))))
    text.write_text("A lazy dog sleeps in the sun and dreams of a quick fox. " * 200)
    start(overrides).join()
    log = next(tmp_path.rglob("run.log")).read_text()
    assert "another version, model or text: the run begins anew" in log
    assert json.loads(next(tmp_path.rglob("result.json")).read_text())["resumed"] == []


def test_a_mistake_leaves_nothing_behind(workshop: Path, tmp_path: Path) -> None:
    """Weights that are not finite will not be finite at the next attempt either."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(workshop / "model", tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    file = tmp_path / "model" / index["model.layers.2.mlp.up_proj.weight"]
    weights = load_file(file)
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    start([*small_run(workshop, tmp_path / "out"), f"model.path={tmp_path / 'model'}"]).join()
    assert "NaN" in json.loads(next(tmp_path.rglob("status.json")).read_text())["reason"]
    assert not list(tmp_path.rglob("blocks"))


@pytest.mark.slow
def test_the_wandb_run_of_a_run_that_goes_on_is_whole(workshop: Path, tmp_path: Path) -> None:
    def history(out: Path) -> list[dict[str, float]]:
        (file,) = out.glob("*/wandb/offline-run-*/*.wandb")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        items = [row["history"]["item"] for row in map(json.loads, lines) if row["type"] == "history"]
        measured = ("block", "error/", "kept_score/")
        return [{k: v for k, v in item.items() if k.startswith(measured)} for item in items if "block" in item]

    for out in (tmp_path / "whole", tmp_path / "killed"):
        overrides = [*small_run(workshop, out), "tracking=wandb", "tracking.mode=offline"]
        overrides.remove("tracking=none")
        if out.name == "killed":
            assert killed_when(start(overrides), lambda at=out: bool(list(at.glob("*/blocks/done-00001.safetensors"))))
        process = start(overrides)
        process.join(120)
        assert process.exitcode == 0
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "killed").glob("*/result.json"))
    assert record["resumed"]
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert [row["block"] for row in history(tmp_path / "whole")] == list(range(len(history(tmp_path / "whole"))))


@pytest.mark.slow
def test_a_disk_that_is_full_and_has_room_again(workshop: Path, tmp_path: Path) -> None:
    """A real one, of memory, in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = " ".join(f"'{a}'" for a in [sys.executable, str(ROOT / "launch.py"), *small_run(workshop, disk / "out")])
    script = (
        f"mount -t tmpfs -o size=200k tmpfs {disk} || exit 77\n{run}\necho code $?\nls {disk}/out/*/blocks\n"
        f"mount -o remount,size=5m {disk}\n{run}\necho code $?\ncp {disk}/out/*/*.json {disk}/out/*/masks* {tmp_path}\n"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets no file system be mounted; test_launch.py has the limit of a file's size")
    assert "code 1" in done.stdout
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "done-00000.safetensors" in done.stdout
    assert "code 0" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())["resumed"][0] >= 1
    start(small_run(workshop, tmp_path / "whole")).join()
    (masks,) = (tmp_path / "whole").glob("*/masks.safetensors")
    assert masks.read_bytes() == (tmp_path / "masks.safetensors").read_bytes()


def test_what_was_measured_on_the_dense_model_is_written_down(tmp_path: Path) -> None:
    dense = Dense("a1", {"text": torch.rand(3)}, {"piqa": {"n": 5, "measures": {"acc": [0.25, None]}}})
    with Journal.open(tmp_path / "blocks", {"id": "a1"}, snapshot_seconds=None) as journal:
        assert journal.dense() is None
        journal.write_dense(dense)
        known = Journal.open(tmp_path / "blocks", {"id": "a1"}, snapshot_seconds=None).dense()
        assert known is not None and (known.run, known.zeroshot) == (dense.run, dense.zeroshot)
        assert torch.equal(known.losses["text"], dense.losses["text"])
        assert Journal.open(tmp_path / "blocks", {"id": "b2"}, snapshot_seconds=None).dense() is None
