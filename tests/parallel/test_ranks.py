"""Several processes that share the sequences prune as one does."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from esparse.cli import registry
from esparse.models.load import BUILTIN
from esparse.models.matrices import BlockMatrices
from esparse.parallel.ranks import Ranks, together
from esparse.records import audit
from esparse.stats import ColumnEntropy, ColumnMax, ColumnMoments, ColumnNorm, Gram, Statistic, TokenSample
from tests import forks, members
from tests.composing import composing
from tests.same import rounding, same_but_for_ties
from tests.workshop import ROOT, furnished, small_run

registry.register()
CPU = torch.device("cpu")
# One sequence in each micro-batch, so that its hidden states are rounded alike wherever it is.
METHODS = {
    "second look": ["model.store=shards", "calibration.sequences=5", "evaluate.max_tokens=96"],
    "gram": ["metric=sparsegpt", "pattern=4:8", "recovery=bias"],
    "measured": ["metric=wanda", "pattern=8:16", "allocation=owl", "shuffle=gns", "recovery=dsnot"],
    "one sequence": ["metric=wanda", "shuffle=none", "update=support", "calibration.sequences=1"],
    "stream": ["metric=wanda", "shuffle=none", "update=alps_parent", "update@update.update=support"],
    "a rank without": ["update=alps_parent", "update@update.update=support", "calibration.sequences=1"],
    "experts": ["calibration.sequences=3", "calibration.length=4", "model.batch_tokens=4", "update=obs"],
}
DAMP = dict.fromkeys(("gram", "stream", "a rank without", "experts"), 0.01)  # of methods that factorise the Gram matrix
SLOW = pytest.mark.slow


class Thread(Ranks):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._board, self._barrier = rank, len(board), board, barrier

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = copy.deepcopy(value)
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def joined(self, x_SN: Tensor) -> Tensor:
        return torch.cat(self.gather(x_SN))

    def sum_(self, x: Tensor) -> None:
        total = sum(part.double() if part.is_floating_point() else part for part in self.gather(x))
        assert isinstance(total, Tensor)
        x.copy_(total)

    def min_(self, x: Tensor) -> None:
        x.copy_(torch.stack(self.gather(x)).amin(0))

    def max_(self, x: Tensor) -> None:
        x.copy_(torch.stack(self.gather(x)).amax(0))


def in_threads(size: int, work: Callable[[Ranks], None]) -> None:
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=20)
    threads = [threading.Thread(target=work, args=(Thread(rank, board, barrier),)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not barrier.broken


def united(build: Callable[..., Statistic], shares: list[Tensor], *, before: list[int]) -> list[Any]:
    """The statistics of ranks with these shares, once they were united."""
    found: list[Any] = [None] * len(shares)

    def work(ranks: Ranks) -> None:
        statistic = build(inputs=5, sequences=4, device=CPU, before=before[ranks.rank])
        for pass_index in range(statistic.passes):
            for part in shares[ranks.rank].split(7):
                statistic.add(part, pass_index)
            statistic.unite(ranks, pass_index, ranks.gather(statistic.tokens))
        found[ranks.rank] = statistic

    in_threads(len(shares), work)
    return found


def starts(shares: list[Tensor]) -> list[int]:
    return [sum(len(share) for share in shares[:rank]) for rank in range(len(shares))]


def values(tokens: int) -> Tensor:
    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(0))
    x[:, 2] += 1000
    x[:, 4] = 0.1  # a channel that never changes
    return x


RESULTS: dict[str, tuple[Callable[..., Statistic], Callable[[Any], Tensor], float]] = {
    "norm": (ColumnNorm, lambda s: s.norm_I("sequence"), 1e-6),
    "max": (ColumnMax, lambda s: s.max_I, 0),
    "mean": (ColumnMoments, lambda s: s.mean_I(), 1e-6),
    "variance": (ColumnMoments, lambda s: s.variance_I(), 1e-6),
    "gram": (Gram, lambda s: s.gram_II, 1e-5),
    "channel": (partial(ColumnEntropy, bins=9, range="channel", limit=1.0), lambda s: s.entropy_I(), 0),
    "layer": (partial(ColumnEntropy, bins=9, range="layer", limit=1.0), lambda s: s.entropy_I(), 0),
    "fixed": (partial(ColumnEntropy, bins=9, range="fixed", limit=1.0), lambda s: s.entropy_I(), 0),
    "sample": (partial(TokenSample, most=10), lambda s: s.x_SI(), 0),
    "whole sample": (partial(TokenSample, most=100), lambda s: s.x_SI(), 0),
}


@pytest.mark.parametrize("sizes", [[48], [24, 24], [21, 0, 27], [0, 0, 5], [40, 3, 5], [0, 0]], ids=str)
@pytest.mark.parametrize("name", RESULTS)
def test_shares_sum_up_to_the_whole(name: str, sizes: list[int]) -> None:
    build, result, tolerance = RESULTS[name]
    x_TI = values(sum(sizes))
    (whole,) = united(build, [x_TI], before=[0])
    shares = list(x_TI.split(sizes))
    for statistic in united(build, shares, before=starts(shares)):
        assert statistic.tokens == sum(sizes)
        torch.testing.assert_close(result(statistic), result(whole), rtol=tolerance, atol=0)
    if name == "variance":
        assert result(whole)[4] == 0


def test_an_expert_does_not_know_what_comes_before() -> None:
    """Its tokens are counted on each rank, behind all tokens of the ranks before, of which it had fewer."""
    sizes, before = [90, 3, 77], [0, 133, 171]
    x_TI = torch.arange(float(sum(sizes)))[:, None].expand(-1, 5)
    build = partial(TokenSample, most=10)
    sample, *others = (s.x_SI()[:, 0].tolist() for s in united(build, list(x_TI.split(sizes)), before=before))
    assert all(other == sample for other in others)
    counted = [start + i for start, size in zip(before, sizes, strict=True) for i in range(size)]
    turns = [(i + 1) / ((1 + 5**0.5) / 2) % 1 for i in counted]
    assert sample == sorted(sorted(range(len(counted)), key=turns.__getitem__)[:10])


def test_groups_that_any_rank_saw() -> None:
    """The second rank alone had tokens for the second expert, and found out that two layers read one tensor."""
    block = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("a", "b", "c")})
    block["experts"] = torch.nn.ParameterDict({"stack": torch.zeros(3, 4, 4)})
    of_ranks: list[Any] = [
        [[(f"block.{name}.weight", False, None, 4)] for name in ("a", "b", "c")],
        [[(f"block.{name}.weight", False, None, 4) for name in ("b", "a")], [("block.experts.stack", True, 1, 4)]],
    ]
    agreed = []
    for _ in of_ranks:
        matrices = BlockMatrices(block, "block")
        assert len(matrices.unite(of_ranks)) == 3
        matrices.complete()
        agreed.append([[matrix.name for matrix in group.matrices] for group in matrices.groups])
    experts = [["block.experts.stack[1]"], ["block.experts.stack[0]"], ["block.experts.stack[2]"]]
    assert agreed[0] == [["block.a", "block.b"], ["block.c"], *experts]
    assert agreed[0] == agreed[1]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = furnished(tmp_path_factory.mktemp("workshop"), blocks=2)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=64,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "experts")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder / "experts")
    return folder


@pytest.fixture(scope="module")
def quick_start() -> Iterator[None]:
    """Processes of a server that has imported the libraries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esparse.parallel.ranks.START", "forkserver")
        forks.server()
        yield


@pytest.fixture(scope="module")
def pruned(workshop: Path, quick_start: None) -> Callable[[str], tuple[Path, Path]]:
    """Folders of a method's runs: carried out by one process, and by two."""

    def prune(name: str) -> tuple[Path, Path]:
        folders = workshop / "one" / name, workshop / "two" / name
        if not folders[0].exists():
            run = [*small_run(workshop, workshop), "model.batch_tokens=16", *METHODS[name]]
            run += [f"model.path={workshop / 'experts'}"] if name == "experts" else []
            members.carry_out(Ranks(), {name: [*run, "model.devices=cpu"]}, workshop / "one")
            together([CPU] * 2, members.carry_out, {name: [*run, "model.devices=cpu:2"]}, workshop / "two")
        return folders

    return prune


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name != "second look" else ()) for name in METHODS])
def test_two_processes_prune_as_one_does(pruned: Callable[[str], tuple[Path, Path]], name: str) -> None:
    one, two = pruned(name)
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
    tokens = "calibration_tokens.safetensors"
    assert (one / tokens).read_bytes() == (two / tokens).read_bytes()
    records = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    assert records[0]["sparsity"] == records[1]["sparsity"]
    assert records[1]["environment"]["device"] == f"2 x {records[0]['environment']['device']}"
    first, second = (audit.read_masks(folder) for folder in (one, two))
    tied = same_but_for_ties((first, second), (records[0]["layers"], records[1]["layers"]), damp=DAMP.get(name))
    losses = [load_file(folder / "window_losses.safetensors") for folder in (one, two)]
    torch.testing.assert_close(*losses, rtol=1e-2 if tied else rounding(64, DAMP.get(name)), atol=0)


@pytest.mark.slow
def test_experts_are_seen_by_some_ranks_only(pruned: Callable[[str], tuple[Path, Path]]) -> None:
    """Else the test above would not say much."""
    layers = json.loads((pruned("experts")[1] / "result.json").read_text())["layers"]
    experts = [layer["error_tokens"] for layer in layers if "experts" in layer["name"]]
    assert min(experts) == 0
    assert 1 in experts  # one token, which can only be one rank's


def test_ranks_tell_each_other_and_one_that_fails_ends_all(quick_start: None) -> None:
    with pytest.raises(ValueError, match=r"^the second rank has a reason") as failed:
        together([CPU] * 2, members.exchange)
    assert "in process 2 of 2:\nTraceback" in failed.value.__notes__[0]


def until(is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not is_time():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ranks_end_with_who_asked_for_them(tmp_path: Path) -> None:
    code = f"import pathlib; from tests.members import *; sleep_together(pathlib.Path({str(tmp_path)!r}))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        until(lambda: all((tmp_path / str(rank)).exists() and (tmp_path / str(rank)).read_text() for rank in (0, 1)))
        process.send_signal(signal.SIGKILL)
    pids = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_process_ends_the_command_and_the_next_one_goes_on(
    pruned: Callable[[str], tuple[Path, Path]], workshop: Path, tmp_path: Path
) -> None:
    """On one device, where two had begun."""
    out = tmp_path / "out"
    overrides = [*small_run(workshop, out), "model.batch_tokens=16", *METHODS["second look"]]
    command = [sys.executable, str(ROOT / "launch.py"), *overrides, "model.devices=cpu:2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        until(lambda: bool(list(out.rglob("done-00000*"))))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "process 2 of 2 was killed by SIGKILL" in said
    assert "Traceback" not in said
    (folder,) = (file.parent for file in out.glob("*/status.json"))
    assert "process 2 of 2" in json.loads((folder / "status.json").read_text())["reason"]
    members.carry_out(Ranks(), {folder.name: [*overrides, "model.devices=cpu"]}, out)
    assert json.loads((folder / "result.json").read_text())["resumed"][0] >= 1
    expected = pruned("second look")[0] / "masks.safetensors"
    assert (folder / "masks.safetensors").read_bytes() == expected.read_bytes()


@pytest.mark.tries(1)
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["metric=regional"], "metric.source=block takes gradients"),
        (["prepare=equalise"], "the preparation (prepare) looks at"),
        (["recovery=variance_block"], "the recovery trains"),
        (["recovery=distill"], "the recovery trains"),
    ],
)
def test_what_needs_all_sequences_is_refused(overrides: list[str], reason: str, tmp_path: Path) -> None:
    with composing():
        config = compose("config", [*overrides, "model.devices=cpu:2"])
        with pytest.raises(ValueError, match=re.escape(reason)) as refused:
            registry.build(config)
        assert "model.devices=cpu:2 deals them out: use model.devices=cpu" in str(refused.value)
        registry.build(compose("config", [*overrides, "model.devices=auto"]))


def test_auto_uses_one_device_where_sequences_cannot_be_dealt_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hydra import compose

    from esparse.cli import registry

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with composing(), caplog.at_level("INFO", "esparse"):
        assert [str(d) for d in registry.build(compose("config", [])).devices()] == ["cuda:0", "cuda:1", "cuda:2"]
        assert [str(d) for d in registry.build(compose("config", ["prepare=equalise"])).devices()] == ["cuda:0"]
    assert "of 3 devices only cuda:0 is used" in caplog.text


@pytest.mark.tries(2)
@pytest.mark.parametrize("devices", ["cpu:0", "cpu:", "cpu:-1", "cpu:two"])
def test_a_number_of_processes_that_makes_no_sense(devices: str) -> None:
    with composing():
        model = registry.build(compose("config", [f"model.devices='{devices}'"])).model
    with pytest.raises(ValueError, match=f"or cpu:N for N processes, got '{devices}'"):
        model.all_devices()
