"""W&B sweeps: a real agent, a server that knows one sweep, and what the runs leave that the agent starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from tests.workshop import furnished, small_run

ROOT = Path(__file__).parents[2]


class Sweep(BaseHTTPRequestHandler):
    """As much of a W&B server as an agent needs: one sweep, whose runs are handed out one after the other."""

    config = ""
    runs: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        text = json.dumps(asked)
        if "SweepWithRuns" in text:
            data: dict[str, Any] = {"project": {"sweep": {"config": self.config, "runs": {"edges": []}}}}
        elif "viewer" in text.lower():
            viewer = {
                "id": "u",
                "name": "us",
                "username": "us",
                "entity": "us",
                "email": "",
                "flags": "{}",
                "admin": False,
            }
            data = {"viewer": viewer | {"teams": {"edges": []}, "apiKeys": {"edges": []}, "deletedAt": None}}
        elif "CreateAgent" in text:
            data = {"createAgent": {"agent": {"id": "agent"}}}
        elif "Heartbeat" in text:
            busy = json.loads(asked["variables"]["runState"])  # the runs that the agent waits for
            commands = [] if busy else [self.runs.pop(0) if self.runs else {"type": "exit"}]
            data = {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        else:
            data = {}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


def run_of(identity: str, **arguments: Any) -> dict[str, Any]:
    args = {name: {"value": value} for name, value in arguments.items()}
    return {"type": "run", "run_id": identity, "program": str(ROOT / "launch.py"), "args": args}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which an agent carried out a sweep of three runs, and what it printed; two runs are the same."""
    place = tmp_path_factory.mktemp("agent")
    (place / "workshop").mkdir()
    given = [
        word for word in small_run(furnished(place / "workshop", blocks=2), place / "out") if word != "tracking=none"
    ]
    command = [sys.executable, "${program}", *given, "tracking.mode=offline", "${args_no_hyphens}"]
    Sweep.config = yaml.safe_dump({"command": command, "method": "grid"})
    same = {"pattern": "2:4", "metric": "wanda"}
    Sweep.runs = [run_of("first", **same), run_of("second", pattern="1:4", metric="wanda"), run_of("again", **same)]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Sweep)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    own |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}", "WANDB_API_KEY": "a" * 40}
    own |= {"HOME": str(place), "PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false"}
    agent = [sys.executable, "-m", "wandb", "agent", "us/mine/sw33p"]
    done = subprocess.run(agent, cwd=place, env=own, capture_output=True, text=True, timeout=400)
    server.shutdown()
    return place, done.stdout + done.stderr


def inspected(place: Path, run: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (file,) = place.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    summary = subprocess.run([*command, "--summary"], capture_output=True, text=True, check=True).stdout
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return json.loads(summary), [json.loads(line) for line in lines]


@pytest.mark.parametrize("run", ["first", "second", "again"])
@pytest.mark.slow
def test_every_run_of_an_agent_has_its_numbers(run: str, swept: tuple[Path, str]) -> None:
    place, printed = swept
    assert "Traceback" not in printed, printed
    summary, records = inspected(place, run)
    pattern = {"second": "1:4"}.get(run, "2:4")
    found = [json.loads(p.read_text()) for p in place.glob("out/*/result.json")]
    (record,) = (one for one in found if one["config"]["pattern"] == pattern)
    ((corpus, quality),) = record["quality"].items()
    assert summary["summary"][f"perplexity/{corpus}/pruned"] == pytest.approx(quality["pruned"])
    assert (summary["state"], summary["config"]["pattern"]) == ("finished", pattern)
    assert any(f"perplexity/{corpus}/pruned" in row["history"]["item"] for row in records if row["type"] == "history")
    assert '"sw33p"' in json.dumps(records)


@pytest.mark.slow
def test_what_an_agent_asks_for_twice_is_carried_out_once(swept: tuple[Path, str]) -> None:
    place, printed = swept
    assert len(list(place.glob("out/*/result.json"))) == 2 and "was run before" in printed
