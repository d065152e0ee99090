"""Channels before and after the shuffle: what a profiled run keeps of them, and what the pictures make of it."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from esparse.metrics import Metric
from esparse.metrics.entropy import EsparsePaper
from esparse.metrics.wanda import Wanda
from esparse.models.blocks import BlockModel
from esparse.patterns import NM
from esparse.pruning.prune import BINS, Method, Pruned, prune
from esparse.records.report import Stages
from esparse.reports.figures.channels import channels, evenness, side_by_side
from esparse.reports.reading import read_records
from esparse.shuffles import NoShuffle
from esparse.shuffles.gns import Gns
from tests.models.families import tiny
from tests.pruning.test_prune import TOKENS_SL
from tests.reports.test_tables import command, record, write
from tests.workshop import furnished, launch, small_run

LAYERS = [f"model.layers.{block}.{layer}" for block in (0, 1, 10) for layer in ("self_attn.q_proj", "mlp.down_proj")]
# Of four groups of two: means 1, 2, 3, 6, so that they differ by sqrt(3.5) around 3. Dealt out: 4, 4, 2, 2.
VALUES_I = np.array([0.0, 2, 1, 3, 2, 4, 5, 7], dtype=np.float32)
DEALT_I = np.array([2, 7, 3, 6, 0, 5, 1, 4], dtype=np.int32)


def kept(root: Path, run: str, shuffle: str, *, pattern: str = "1:2", seed: int = 0, **settings: Any) -> None:
    """A record beside which the channels of six inputs lie, and their orders where it has a shuffle."""
    one = record(run, pattern=pattern, seed=seed)
    one["config"]["choices"]["shuffle"] = shuffle
    one["config"]["shuffle"] = settings
    one["layers"] = [{"name": name, "pattern": pattern, "relative_error": 0.1, "kept_score": 0.9} for name in LAYERS]
    write(root, one)
    values = {f"{kind}/{name}": VALUES_I * scale for name in LAYERS for kind, scale in SCALES.items()}
    save_file(values, root / run / "channels.safetensors")
    if shuffle != "none":
        save_file({f"{name}.weight": DEALT_I for name in LAYERS}, root / run / "orders.safetensors")


SCALES = {"entropy": 1.0, "norm": 10.0, "score": 0.5}


def shown(figure: Any) -> list[tuple[str, str, list[float], list[float]]]:
    """Of every panel its two titles, the channels and the groups' means."""
    panels = []
    for ax in figure.axes:
        means = [[float(y) for (_, y), _ in part.get_segments()] for part in ax.collections]
        panels.append((ax.get_title("left"), ax.get_title("right"), list(ax.lines[0].get_ydata()), [*chain(*means)]))
    return panels


def test_a_record_that_lacks_its_choices_has_a_picture(tmp_path: Path) -> None:
    kept(tmp_path, "a", "none")
    path = tmp_path / "a" / "result.json"
    one = json.loads(path.read_text())
    one["config"] = {}
    one["layers"].append({"relative_error": 0.1})
    path.write_text(json.dumps(one))
    assert channels(read_records(tmp_path)).get_suptitle().startswith("tiny, 1:2, -: the input of ")
    assert evenness(read_records(tmp_path)) is not None


@pytest.mark.parametrize("name", ["channels", "orders"])
def test_damaged_channels_are_named_once_and_left_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept(tmp_path, "a", "gns")
    kept(tmp_path, "b", "none")
    path = tmp_path / "a" / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    records = read_records(tmp_path)
    assert list(side_by_side(records)) == list(side_by_side(records)) == ["none"]
    assert capsys.readouterr().err.count(f"{path} is left out: it is damaged (") == 1


def test_channels_stand_at_their_places(tmp_path: Path) -> None:
    kept(tmp_path, "a", "gns")
    kept(tmp_path, "b", "none")
    figure = channels(read_records(tmp_path))
    assert figure.get_suptitle() == "tiny, 1:2, wanda: the input of model.layers.1.self_attn.q_proj"
    panels = shown(figure)
    assert panels[0] == ("own order", "± 62.4%", VALUES_I.tolist(), [1, 2, 3, 6])  # sqrt(3.5) / 3
    dealt = [1, 7, 3, 5, 0, 4, 2, 2]
    assert panels[1] == ("gns", "± 33.3%", dealt, [4, 4, 2, 2])
    assert [panel[1] for panel in panels] == ["± 62.4%", "± 33.3%"] * 3
    assert panels[3][2:] == ([10 * x for x in dealt], [40, 40, 20, 20])
    # The segments span their groups: two channels each, centred on them.
    assert [seg[:, 0].tolist() for seg in figure.axes[0].collections[0].get_segments()][:2] == [[-0.5, 1.5], [1.5, 3.5]]
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == ["entropy (nats)", "norm (RMS)", "mean score"]


def test_another_layer_can_be_asked_for(tmp_path: Path) -> None:
    kept(tmp_path, "a", "gns")
    figure = channels(read_records(tmp_path), "10.mlp")
    assert figure.get_suptitle().endswith("the input of model.layers.10.mlp.down_proj")
    with pytest.raises(ValueError, match=r"no input is read first by a layer called 'k_proj'; there is model\.layers"):
        channels(read_records(tmp_path), "k_proj")
    code, _, err = command(tmp_path, "--out", tmp_path / "a.png", "--plot", "channels", "--layer", "10.mlp")
    assert (code, err) == (0, "") and (tmp_path / "a.png").stat().st_size > 10_000


def test_evenness_along_depth_by_hand(tmp_path: Path) -> None:
    kept(tmp_path, "a", "gns")
    lines = {line.get_label(): line.get_data() for line in evenness(read_records(tmp_path)).axes[0].lines}
    assert {label: list(x) for label, (x, _) in lines.items()} == {"own order": [0, 1, 10], "gns": [0, 1, 10]}
    assert lines["own order"][1] == pytest.approx([100 * 3.5**0.5 / 3] * 3)
    assert lines["gns"][1] == pytest.approx([100 / 3] * 3)


def test_only_runs_that_differ_by_nothing_but_the_shuffle_stand_together(tmp_path: Path) -> None:
    kept(tmp_path, "a", "none", seed=1)
    kept(tmp_path, "b", "gns", seed=1)
    kept(tmp_path, "c", "esparse", pattern="2:4")
    kept(tmp_path, "d", "gns", deal="serpentine")
    kept(tmp_path, "e", "gns", deal="straight")
    kept(tmp_path, "f", "lbs")
    runs = side_by_side(read_records(tmp_path))
    assert {label: run["id"] for label, run in runs.items()} == {
        "gns, deal=serpentine": "d",
        "gns, deal=straight": "e",
        "lbs": "f",
    }


def test_experts_have_orders_of_their_own(tmp_path: Path) -> None:
    kept(tmp_path, "a", "gns")
    one = json.loads((tmp_path / "a" / "result.json").read_text())
    one["layers"] = [{"name": f"h.0.experts.down[{e}]", "pattern": "1:2"} for e in (0, 1)]
    (tmp_path / "a" / "result.json").write_text(json.dumps(one))
    values = {f"{kind}/h.0.experts.down[{e}]": VALUES_I for kind in SCALES for e in (0, 1)}
    save_file(values, tmp_path / "a" / "channels.safetensors")
    stacked_EI = np.stack([np.arange(8, dtype=np.int32), DEALT_I])
    save_file({"h.0.experts.down": stacked_EI}, tmp_path / "a" / "orders.safetensors")
    means = [shown(channels(read_records(tmp_path), f"down[{e}]"))[1][3] for e in (0, 1)]
    assert means == [[1, 2, 3, 6], [4, 4, 2, 2]]


def test_without_groups_only_the_channels_are_shown(tmp_path: Path) -> None:
    kept(tmp_path, "a", "none", pattern="50%")
    assert shown(channels(read_records(tmp_path)))[0] == ("own order", "", VALUES_I.tolist(), [])
    assert evenness(read_records(tmp_path)) is None


def test_runs_without_a_profile_have_no_such_picture(tmp_path: Path) -> None:
    write(tmp_path, record("a"))
    assert channels(read_records(tmp_path)) is None and channels([record("a")]) is None
    code, _, err = command(tmp_path, "--out", tmp_path / "a.png", "--plot", "channels")
    said = "esparse: no run has what a plot of channels shows: it needs runs with profile=true\n"
    assert (code, err) == (2, said) and not (tmp_path / "a.png").exists()


def pruned(metric: Metric, *, profile: bool, family: str = "llama", **settings: Any) -> Pruned:
    blocks = BlockModel(tiny(family), device=torch.device("cpu"), batch_tokens=40)
    method = Method(metric=metric, pattern=NM(2, 4), **{"shuffle": Gns(deal="straight")} | settings)
    return prune(blocks, TOKENS_SL, method, stages=Stages(), profile=profile)


def entropies(x_TI: torch.Tensor, bins: int) -> list[float]:
    """Of each column's histogram from its least to its greatest value, one value after the other."""
    found = []
    for column in x_TI.double().T.tolist():
        low, width = min(column), max(column) - min(column)
        counts = [0] * bins
        for value in column:
            counts[min(int((value - low) / width * bins), bins - 1)] += 1
        found.append(-sum(c / len(column) * np.log(c / len(column)) for c in counts if c))
    return found


@pytest.mark.parametrize(("metric", "bins"), [(Wanda(), BINS), (None, 20)])
def test_what_is_kept_against_a_slow_count(metric: Metric | None, bins: int) -> None:
    of_metric = EsparsePaper(base="magnitude", alpha=1.0, bins=20, norm="rms", range="channel", limit=1.0)
    got = pruned(metric or of_metric, profile=True).channels
    dense, seen = tiny("llama"), {}
    attention = dense.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(TOKENS_SL, use_cache=False)
    x_TI, name = seen["x"], "model.layers.0.self_attn.q_proj"
    entropy_I, rms_I = torch.tensor(entropies(x_TI, bins)), x_TI.double().square().mean(0).sqrt()
    assert got[f"norm/{name}"].tolist() == pytest.approx(rms_I.tolist(), rel=1e-5)
    assert got[f"entropy/{name}"].tolist() == pytest.approx(entropy_I.tolist(), abs=0.02)
    weight_OI = torch.cat([getattr(attention, f"{part}_proj").weight for part in "qkv"]).double().abs()
    channel_I = rms_I * TOKENS_SL.shape[1] ** 0.5 if metric else entropy_I + rms_I
    assert got[f"score/{name}"].tolist() == pytest.approx((weight_OI.mean(0) * channel_I).tolist(), rel=0.01)
    assert all(value_I.dtype == torch.float32 for value_I in got.values())
    # One of each kind for the four inputs of each block.
    assert len(got) == 3 * 4 * len(dense.model.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_profile_changes_no_mask(family: str) -> None:
    without, with_it = (pruned(Wanda(), profile=profile, family=family) for profile in (False, True))
    assert without.channels == {} and with_it.channels
    assert all(torch.equal(with_it.keeps[name], keep) for name, keep in without.keeps.items())
    reading = {layer.name for layer in with_it.layers}
    assert {name.partition("/")[2] for name in with_it.channels} <= reading


def test_an_unshuffled_run_has_them_too() -> None:
    assert pruned(Wanda(), profile=True, shuffle=NoShuffle()).channels


@pytest.mark.slow
def test_a_run_writes_them_and_the_pictures_read_them(tmp_path: Path) -> None:
    overrides = small_run(furnished(tmp_path, blocks=3), tmp_path / "out")
    done = launch("-m", *overrides, "profile=true", "shuffle=none,gns,esparse")
    assert done.returncode == 0, done.stderr
    for folder in (path.parent for path in (tmp_path / "out").glob("*/result.json")):
        assert len(load_file(folder / "channels.safetensors")) == 3 * 4 * 3
    figure = channels(read_records(tmp_path / "out"))
    panels = shown(figure)
    assert [panel[0] for panel in panels[:3]] == ["own order", "esparse", "gns"]
    assert "model.layers.1.self_attn.q_proj" in figure.get_suptitle()
    # What is dealt out by mean score is evener by it than what was not.
    by_title = {panel[0]: float(score[1].strip("±% ")) for panel, score in zip(panels[:3], panels[6:], strict=True)}
    assert by_title["gns"] < by_title["own order"]
