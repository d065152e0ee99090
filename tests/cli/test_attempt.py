"""One run in this process, with a stand-in for the pruning: what is refused, what is said, what is kept."""

from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from esparse.cli import attempt, foresight, registry, sweep_check
from esparse.cli.call import FINISHED, Call, call
from esparse.cli.earlier import differs
from esparse.cli.help_text import store_not_copied
from esparse.errors import Mistake
from esparse.jobs import lock
from esparse.pruning.journal import Journal
from esparse.records import sources
from esparse.records.report import run_id, write_json
from esparse.records.sources import CORPUS, Sources
from esparse.run import experiment as one_run
from tests.composing import composing


@pytest.fixture(autouse=True)
def fresh_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Call.__dataclass_fields__:
        monkeypatch.setattr(call, name, getattr(Call(), name))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Of a run whose text lies in tmp_path."""
    (tmp_path / "text.txt").write_text("one text")
    with composing():
        words = ["calibration=text", f"calibration.path={tmp_path / 'text.txt'}", "model.devices=cpu", "tracking=none"]
        config = compose("config", [*words, f"output_root={tmp_path / 'out'}"], return_hydra_config=True)
    return registry.resolved(config, registry.build(config), config.hydra.runtime.choices)


def folder_of(settings: dict[str, Any]) -> Path:
    return Path(settings["output_root"]) / run_id(settings)


def record_of(settings: dict[str, Any]) -> dict[str, Any]:
    record = {"id": run_id(settings), "name": "x", "status": "finished", "seconds": 1.0, "config": settings}
    record |= {"model": {"name": "tiny"}, "sparsity": {"pattern": "2:4", "density": 0.5}, "quality": {}}
    return record | {"sources": Sources.begin(settings).record()}


def carried_out(settings: dict[str, Any]) -> dict[str, Any] | None:
    return attempt.carry_out(registry.rebuilt(settings), settings)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (json.JSONDecodeError("Expecting value", "<html>", 0), "(JSONDecodeError; the traceback is in "),
        (ValueError("zip() argument 2 is shorter"), "(ValueError; the traceback is in "),
        (Mistake("the text is too short"), "failed: the text is too short\n"),
    ],
)
def test_only_what_esparse_foresaw_goes_without_a_traceback(
    error: Exception,
    said: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(one_run, "run", fail)
    assert carried_out(settings) is None
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("error", "stays"), [(json.JSONDecodeError("x", "<html>", 0), True), (Mistake("x"), False)])
def test_finished_blocks_outlive_what_others_raise(error: Exception, stays: bool, tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "blocks", {"id": "x"}, snapshot_seconds=None)
    (tmp_path / "blocks" / "pruned-00000.safetensors").write_bytes(b"hours of work")
    with pytest.raises(type(error)), journal:
        raise error
    assert (tmp_path / "blocks").exists() == stays


def test_a_text_that_changed_is_another_run(settings: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    record = record_of(settings)
    assert set(record["sources"]) == {"calibration.path", "evaluate.corpora", "model.path"}
    folder_of(settings).mkdir(parents=True)
    write_json(folder_of(settings) / "result.json", record)
    text = tmp_path / "text.txt"
    text.write_text("one text")  # written anew, and the same
    assert carried_out(settings) == json.loads((folder_of(settings) / "result.json").read_text())
    before = text.stat()
    text.write_text("one tent")  # as long as before
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))  # and as old
    assert carried_out(settings) is None
    said = capsys.readouterr().err
    assert "holds something else" in said and "rerun=true replaces its record" in said
    assert call.code == 1 and (folder_of(settings) / "result.json").exists()
    text.unlink()
    assert carried_out(settings) is not None  # nobody can say


def test_a_run_on_another_built_in_corpus_is_another_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["zeroshot"] |= {"tasks": ["builtin"]}
    settings["calibration"] |= {"corpus": "builtin", "path": None}
    record = record_of(settings)
    reading = {"calibration.corpus", "evaluate.corpora", "zeroshot.tasks"}
    assert set(record["sources"]) == {*reading, "model.path"}
    assert record["sources"]["evaluate.corpora"][CORPUS.name]["sha256"] == sha256(CORPUS.read_bytes()).hexdigest()
    assert differs(record, settings) is None
    # Records from before the corpus had a file say nothing of it, or have no `sources` at all.
    for setting in reading:
        del record["sources"][setting]
        why = differs(record, settings)
        assert why is not None and "the built-in corpus was another one then" in why and "rerun=true" in why
    del record["sources"]
    assert "the built-in corpus was another one then" in str(differs(record, settings))
    own = {"calibration": {"corpus": "text"}, "evaluate": {"corpora": ["text"]}, "zeroshot": {"tasks": []}}
    for group, change in own.items():
        settings[group] |= change
    assert differs(record | {"config": settings}, settings) is None

    record = record_of(settings | {"calibration": settings["calibration"] | {"corpus": "builtin"}})
    other = tmp_path / CORPUS.name
    other.write_bytes(b"other passages")
    monkeypatch.setattr(sources, "CORPUS", other)
    assert f"calibration.corpus: {other} holds something else" in str(differs(record, record["config"]))


def test_a_model_that_changed_is_another_run(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "README.md").write_text("no part of it")
    settings["model"] |= {"path": str(model)}
    record = record_of(settings)
    (model / "README.md").write_text("another text")
    assert differs(record, settings) is None
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    assert "model.safetensors holds something else" in str(differs(record, settings))
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is new" in str(differs(record, settings))


def test_a_file_that_changed_while_it_was_read_has_no_digest(settings: dict[str, Any], tmp_path: Path) -> None:
    read = Sources.begin(settings)
    (tmp_path / "text.txt").write_text("another text")
    assert read.record()["calibration.path"]["text.txt"]["sha256"] is None


def test_two_runs_of_one_id_are_told_apart(settings: dict[str, Any]) -> None:
    other = settings | {"seed": 7}
    assert "whose id is the same by chance" in str(differs(record_of(other), settings))
    assert differs(record_of(settings | {"rerun": True, "output_root": "x"}), settings) is None
    settings["evaluate"] |= {"corpora": ["text"]}
    assert differs({"status": "finished"}, settings) is None  # of an old version


@pytest.mark.parametrize("left", ["", "[]", '{"status": "finished"}', "id", "sparsity"])
def test_a_damaged_record_is_no_end(
    left: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, record = folder_of(settings), record_of(settings)
    folder.mkdir(parents=True)
    without = json.dumps({key: value for key, value in record.items() if key != left})
    (folder / "result.json").write_text(without if left in record else left)
    monkeypatch.setattr(attempt, "_attempt", lambda *given: record)
    assert carried_out(settings) == record
    assert f"{folder / 'result.json'} is damaged: the run is carried out again" in caplog.messages


def test_what_is_in_the_way_of_a_run_is_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, experiment = folder_of(settings), registry.rebuilt(settings)
    foresight.check(experiment, settings)
    (folder / "owner.json").mkdir(parents=True)
    with pytest.raises(Mistake, match=r"owner\.json is a folder, and a file of the run has that name: move it away"):
        foresight.check(experiment, settings)
    (folder / "owner.json").rmdir()
    (folder / "result.json").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("result.json"))  # root reads all
    with pytest.raises(Mistake, match=r"result\.json cannot be read by this user: ask its owner \("):
        foresight.check(experiment, settings)
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(Mistake, match=f"{folder.name} is a file, and the run's folder would have that name"):
        foresight.check(experiment, settings)


@pytest.mark.parametrize("export", ["dense", "packed"])
def test_biases_without_a_place_are_seen_before_the_model_is_loaded(export: str, tmp_path: Path) -> None:
    words = ["recovery=bias", "shuffle=none", f"export={export}", "model.devices=cpu", f"output_root={tmp_path}"]
    with composing():
        config = compose("config", words, return_hydra_config=True)
    settings = registry.resolved(config, experiment := registry.build(config), config.hydra.runtime.choices)
    refused = pytest.raises(Mistake, match="has no place for them: use export=packed")
    with refused if export == "dense" else nullcontext():
        foresight.check(experiment, settings)


def test_a_run_that_still_writes_is_left_alone(settings: dict[str, Any]) -> None:
    """Between its record and its status another call comes by."""
    folder = folder_of(settings)
    folder.mkdir(parents=True)
    write_json(folder / "result.json", record_of(settings))
    with lock.owned(folder):
        (folder / "status.json.part").write_text("{}")
        assert carried_out(settings) is not None
        assert (folder / "status.json.part").exists() and lock.read(folder) is not None
    assert carried_out(settings) is not None
    assert not list(folder.glob("*.part")) and call.code == FINISHED


def test_hydras_store_is_as_it_was_outside_of_a_call() -> None:
    """A process may have another Hydra app."""
    store = ConfigStore.instance()
    with store_not_copied():
        assert copy.deepcopy(store) is store
    assert copy.deepcopy(store) is not store


def test_a_sweep_of_many_runs_says_that_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sweep_check.log, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(sweep_check, "_jobs", lambda config: [[f"seed={seed}"] for seed in range(1944)])
    monkeypatch.setattr(sweep_check, "_composed", lambda *_: ({"dry_run": True, "export": {}}, []))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "x/sweeps/name"}}})
    sweep_check.Sweep().on_multirun_start(config)
    assert said == ["checking 1944 runs before the first one begins"] and len(call.runs) == 1944
