"""W&B runs as files tell them: real offline runs, read back with W&B's own reader."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from base64 import b64encode
from contextlib import contextmanager
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf

from esparse.cli import registry
from esparse.run.tracking import NoTracking, Wandb, offline_runs
from tests.composing import composing

CONF = Path(__file__).parents[2] / "conf"
PLACE = {"project": "esparse", "entity": None, "group": None, "tags": [], "artifacts": []}
SETTINGS = {"mode": "offline", "timeout_s": 20.0, **PLACE}
CONFIG = {
    "pattern": "2:4",
    "metric": {"_class": "Entropy", "alpha": 0.5},
    "choices": {"metric": "entropy"},
    "path": Path("x"),
}
RECORD = {
    "id": "1a2b3c4d",
    "seconds": 12.5,
    "config": CONFIG,
    "sparsity": {"pattern": "2:4", "density": 0.5, "pattern_holds": True},
    "quality": {"builtin": {"dense": 7.25, "pruned": 9.5, "tokens": 10}},
    "layers": [
        {"name": "h.0.a", "shape": [4, 8], "kept_score": 0.75, "relative_error": 0.125},
        {"name": "h.0.b", "shape": [8, 4], "kept_score": 0.5, "relative_error": None},
    ],
}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """No test sees the settings of this machine, and none leaves wandb-core behind with its own."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    yield
    getattr(sys.modules.get("wandb"), "teardown", lambda: None)()


def tracking(**changed):
    return Wandb(**(SETTINGS | changed))


def start(component, folder, run_id="1a2b3c4d", config=CONFIG):
    return component.run(run_id=run_id, name="tiny 2:4 entropy", config=config, folder=folder)


def files_of(folder, kind="offline-run"):
    return sorted(folder.glob(f"wandb/{kind}-*/run-*.wandb"))


def inspect(file, *flags):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def messages(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_offline_run_holds_config_history_summary_and_table(tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO, "esparse"), start(tracking(tags=["a:b"], group="g"), tmp_path) as sink:
        sink.log({"block": 0, "kept_score/a": 0.75})
        sink.log({"block": 1, "kept_score/a": 0.5})
        sink.finish(RECORD)
    (file,) = files_of(tmp_path)
    records = [json.loads(line) for line in inspect(file).splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(row["block"], row["kept_score/a"]) for row in history[:2]] == [(0, 0.75), (1, 0.5)]
    assert history[2]["perplexity/builtin/pruned"] == 9.5  # a W&B sweep looks into the history
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    stepped = {metric.get("glob_name"): metric.get("step_metric") for metric in metrics if "glob_name" in metric}
    assert stepped == {"error/*": "block", "kept_score/*": "block"}

    run = json.loads(inspect(file, "--summary"))
    assert (run["run_id"], run["name"], run["project"]) == ("1a2b3c4d", "tiny 2:4 entropy", "esparse")
    assert (run["state"], run["exit_code"], run["tags"]) == ("finished", 0, ["a:b"])
    assert run["config"] == {"pattern": "2:4", "metric": "entropy", "metric/alpha": 0.5, "path": "x"}
    summary = run["summary"]
    assert summary["perplexity/builtin/dense"] == 7.25 and summary["perplexity/builtin/pruned"] == 9.5
    assert summary["perplexity/builtin/ratio"] == 9.5 / 7.25 and summary["perplexity/builtin/tokens"] == 10
    assert (summary["mean_error"], summary["mean_kept_score"]) == (0.125, 0.625)
    assert not [key for key in summary if key.startswith(("quality", "error/", "kept_score/"))]
    assert summary["sparsity/pattern_holds"] is True and summary["seconds"] == 12.5
    assert not [key for key in summary if key.startswith("config")]
    table = json.loads((file.parent / "files" / summary["layers"]["path"]).read_text())
    assert table["columns"] == ["block", "kind", "name", "shape", "kept_score", "relative_error"]
    assert table["data"] == [[0, "a", "h.0.a", "4x8", 0.75, 0.125], [0, "b", "h.0.b", "8x4", 0.5, None]]
    chart = json.loads((file.parent / "files" / summary["kept_score_by_block_table"]["path"]).read_text())
    assert chart["data"] == [[0, "a", 0.75], [0, "b", 0.5]]

    assert messages(caplog, logging.INFO) == []  # the end of the sweep says it for all
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} <= {"wandb", ".cache"}  # .cache: W&B's own debug log


def test_a_run_of_no_sweep_says_how_to_upload_it(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "esparse"), start(tracking(), tmp_path):
        pass
    (file,) = files_of(tmp_path)
    ours = [record.getMessage() for record in caplog.records if record.name == "esparse"]
    assert ours == [f"to upload this run to W&B: wandb sync {file.parent}"]


@pytest.mark.slow
def test_a_sweep_is_a_group_unless_told_otherwise(tmp_path):
    for group, expected in [(None, "of-the-day"), ("mine", "mine")]:
        component = tracking(group=group)
        component.in_sweep("of-the-day")
        with start(component, tmp_path / expected):
            pass
        assert f'"{expected}"' in inspect(*files_of(tmp_path / expected))
    NoTracking().in_sweep("of-the-day")


def test_masks_are_uploaded_when_asked_for(tmp_path):
    (tmp_path / "masks.safetensors").write_bytes(b"masks")
    with start(tracking(artifacts=["masks"]), tmp_path) as sink:
        sink.finish(RECORD)
    kinds = [json.loads(line) for line in inspect(*files_of(tmp_path)).splitlines()]
    (artifact,) = [kind for kind in kinds if "artifact" in kind["type"] and "masks-1a2b3c4d" in json.dumps(kind)]
    assert "masks.safetensors" in json.dumps(artifact)


@pytest.mark.slow
def test_a_checkpoint_is_uploaded_from_where_it_lies(tmp_path, monkeypatch):
    (tmp_path / "export" / "sub").mkdir(parents=True)
    files = {"model.safetensors": b"weights" * 10_000, "sub/config.json": b"{}"}
    for name, content in files.items():
        (tmp_path / "export" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)  # `wandb sync` is called from anywhere
    component = tracking(artifacts=["checkpoint"])
    assert component.needs_export() and not tracking(artifacts=["masks"]).needs_export()
    with start(component, tmp_path / "run") as sink:
        sink.finish(RECORD | {"export": {"path": "export", "format": "packed", "bytes": 70_000}})
    rows = [json.loads(line) for line in inspect(*files_of(tmp_path / "run")).splitlines()]
    (artifact,) = [row["artifact"] for row in rows if row["type"] == "artifact" and row["artifact"]["type"] == "model"]
    assert artifact["name"] == "checkpoint-1a2b3c4d" and json.loads(artifact["metadata"])["format"] == "packed"
    digests = {name: b64encode(md5(content).digest()).decode() for name, content in files.items()}
    contents = artifact["manifest"]["contents"]
    assert {entry["path"]: entry["digest"] for entry in contents} == digests
    assert {entry["path"]: Path(entry["local_path"]) for entry in contents} == {
        n: tmp_path / "export" / n for n in files
    }
    copies = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size == 70_000]
    assert not copies


@pytest.mark.slow
def test_a_job_that_is_preempted_says_so(tmp_path):
    with pytest.raises(SystemExit), start(tracking(), tmp_path) as sink:
        sink.log({"block": 0})
        sys.exit(-1)  # as submitit does once the job is requeued
    assert "preempting" in inspect(*files_of(tmp_path))


@pytest.mark.slow
def test_each_run_of_a_process_is_its_own(tmp_path):
    for run_id, alpha in [("aaaa", 0.5), ("bbbb", 1.0)]:
        with start(tracking(), tmp_path / run_id, run_id, {"alpha": alpha}) as sink:
            sink.finish({"seconds": alpha})
    for run_id, alpha in [("aaaa", 0.5), ("bbbb", 1.0)]:
        (file,) = files_of(tmp_path / run_id)
        run = json.loads(inspect(file, "--summary"))
        assert (run["run_id"], run["config"], run["summary"]["seconds"]) == (run_id, {"alpha": alpha}, alpha)


def test_an_exception_marks_the_run_failed_and_goes_on(tmp_path):
    with pytest.raises(ZeroDivisionError), start(tracking(), tmp_path) as sink:
        sink.log({"block": 0})
        1 / 0  # noqa: B018
    run = json.loads(inspect(*files_of(tmp_path), "--summary"))
    assert (run["exit_code"], run["state"], run["summary"]["block"]) == (1, "failed", 0)


@pytest.mark.slow
def test_an_unreachable_server_costs_seconds_and_one_sentence(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    began = time.monotonic()
    with start(tracking(mode="online", timeout_s=1), tmp_path) as sink:
        sink.finish(RECORD)
    assert time.monotonic() - began < 12
    (file,) = files_of(tmp_path)
    assert files_of(tmp_path, "run") == []  # nothing of the attempt is left
    (warning,) = messages(caplog, logging.WARNING)
    assert warning.startswith("W&B could not be reached (") and "127.0.0.1:9" in warning
    assert warning.endswith(f"the run goes on offline, to upload it later: wandb sync {file.parent}")
    assert json.loads(inspect(file, "--summary"))["summary"]["seconds"] == 12.5


def test_online_without_a_key_goes_on_offline_at_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the setting decides, not what the shell has lying about
    with start(tracking(mode="online"), tmp_path) as sink:
        sink.log({"block": 0})
    (warning,) = messages(caplog, logging.WARNING)
    assert "there is no API key: run `wandb login`" in warning
    assert len(files_of(tmp_path)) == 1


class _Server(BaseHTTPRequestHandler):
    """As much of a W&B server as a run needs to start; `hang` set, it never answers again."""

    hang = threading.Event()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        if self.hang.is_set():
            return time.sleep(20)
        bucket = {"id": "x", "name": "1a2b3c4d", "project": {"name": "p", "entity": {"name": "e"}}}
        known = {"UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        answer = json.dumps({"data": known.get(asked.get("operationName"), {})}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@contextmanager
def server():
    _Server.hang.clear()
    serving = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    serving.daemon_threads, serving.block_on_close = True, False
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{serving.server_address[1]}"
    finally:
        serving.shutdown()
        serving.server_close()


@pytest.mark.slow
def test_a_server_that_falls_silent_costs_seconds_at_the_end(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        with start(tracking(mode="online", timeout_s=2), tmp_path) as sink:
            assert messages(caplog, logging.WARNING) == []  # it started online
            sink.log({"block": 0})
            _Server.hang.set()
            sink.finish({"seconds": 1.5})
            began = time.monotonic()
        assert time.monotonic() - began < 8
        (file,) = files_of(tmp_path, "run")
        (warning,) = messages(caplog, logging.WARNING)
        expected = f"W&B did not take the whole run within 2 s; to upload the rest: wandb sync {file.parent}"
        assert warning == expected
        assert json.loads(inspect(file, "--summary"))["summary"]["seconds"] == 1.5


def test_a_failing_wandb_warns_once_and_spares_the_run(tmp_path, caplog, monkeypatch):
    with start(tracking(), tmp_path) as sink:
        monkeypatch.setattr(sink._run, "log", lambda values: 1 / 0)
        sink.log({"block": 0})
        sink.log({"block": 1})
    (warning,) = messages(caplog, logging.WARNING)
    assert warning == "W&B failed (division by zero); the run and its record go on."


def test_a_wandb_that_is_not_there_is_said_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ImportError
    for mode in ("offline", "online"):
        with start(tracking(mode=mode), tmp_path) as sink:
            sink.log({"block": 0})
            sink.finish(RECORD)
    first, second = messages(caplog, logging.WARNING)
    assert first == second and first.startswith("W&B could not be started (") and "wandb" in first


def test_no_tracking_never_imports_wandb(tmp_path):
    code = f"""
import sys, pathlib
import esparse.run.tracking as t
with t.NoTracking().run(run_id="a", name="n", config={{}}, folder=pathlib.Path({str(tmp_path)!r})) as sink:
    sink.log({{"block": 0}})
    sink.finish({{"seconds": 1.0}})
print([name for name in ("wandb", "torch", "rich", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_no_tracking_passes_exceptions_on(tmp_path):
    with pytest.raises(KeyError), start(NoTracking(), tmp_path):
        raise KeyError("x")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mode": "onlin"}, "offline, online, disabled, got 'onlin'"),
        ({"project": "a:b"}, "tracking.project"),
        ({"tags": [""]}, "tracking.tags"),
        ({"timeout_s": 0}, "tracking.timeout_s"),
        ({"artifacts": ["weights"]}, "tracking.artifacts must be one of masks, checkpoint, got 'weights'"),
    ],
)
def test_a_setting_that_wandb_would_refuse_is_an_error(changed, named):
    with pytest.raises(ValueError, match=named):
        tracking(**changed)


def composed(*words):
    with composing():
        return registry.build(compose("config", list(words))).tracking


@pytest.mark.slow
def test_wandbs_variables_stand_in_for_what_is_not_typed(tmp_path, monkeypatch):
    values = {"MODE": "dryrun", "PROJECT": "mine", "ENTITY": "us", "RUN_GROUP": "tonight", "TAGS": "a,b"}
    for name, value in values.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    found = composed()
    assert (found.mode, found.project, found.entity, found.group) == ("offline", "mine", "us", "tonight")
    with start(found, tmp_path):
        pass
    assert json.loads(inspect(*files_of(tmp_path), "--summary"))["tags"] == ["a", "b"]
    typed = composed("tracking.project=typed", "tracking.mode=online", "tracking.tags=[c]")
    assert (typed.project, typed.mode, typed.tags) == ("typed", "online", ["c"])
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(ValueError, match="WANDB_MODE"):
        composed()


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_wandb_is_disabled(name, value, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO, "esparse"), start(composed(), tmp_path) as sink:
        sink.log({"block": 0})
        sink.finish(RECORD)
    assert "W&B is disabled" in caplog.text and not list(tmp_path.glob("*wandb*"))


@pytest.mark.slow
def test_where_and_how_a_run_is_called(tmp_path, caplog, monkeypatch):
    for name, value in {"DIR": str(tmp_path / "there"), "NAME": "my run", "RUN_ID": "other"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with start(tracking(), tmp_path / "run"):
        pass
    (run,) = offline_runs(tmp_path / "run", "1a2b3c4d")
    assert run.is_relative_to(tmp_path / "there")
    (file,) = run.glob("*.wandb")
    assert json.loads(inspect(file, "--summary"))["name"] == "my run"
    assert "WANDB_RUN_ID is not followed" in caplog.text


@pytest.mark.slow
def test_an_attempt_that_goes_on_takes_the_place_of_the_one_before(tmp_path):
    """Else `wandb sync` of both would begin the history anew."""
    for attempt in range(2):
        with contextlib.suppress(KeyboardInterrupt), start(tracking(), tmp_path) as sink:
            assert sink.logged == 0  # offline nobody knows what was before
            sink.log({"block": attempt})
            if attempt == 0:
                raise KeyboardInterrupt
            time.sleep(1.1)  # W&B names folders by the second
    (file,) = files_of(tmp_path)
    records = [json.loads(line) for line in inspect(file).splitlines()]
    assert [r["history"]["item"]["block"] for r in records if r["type"] == "history"] == [1]
    with start(tracking(), tmp_path, run_id="another"):
        pass
    assert len(files_of(tmp_path)) == 2  # of another run


@pytest.mark.parametrize(("option", "expected"), [("wandb", Wandb), ("none", NoTracking)])
def test_the_options_on_the_command_line_become_components(option, expected):
    with composing():
        component = OmegaConf.to_object(compose(f"tracking/{option}").tracking)
    assert type(component) is expected
    if option == "wandb":
        assert component == Wandb(**SETTINGS | {"timeout_s": 30.0})
