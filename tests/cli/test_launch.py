"""launch.py as a process: the main job, sweeps, and one clear sentence for everything that can be wrong.

The runs here are as small as they can be: a two-block LLaMA with random weights, 4 sequences of 16 tokens.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from esparse.cli import attempt, foresight
from esparse.records import audit
from esparse.records.report import write_json
from tests.workshop import furnished, launch, launch_anew, small_run

ROOT = Path(__file__).parents[2]
CONTRACT = {
    "id": str,
    "name": str,
    "status": str,
    "started": str,
    "seconds": float,
    "config": dict,
    "environment": dict,
    "model": dict,
    "sparsity": dict,
    "quality": dict,
    "layers": list,
    "seconds_by_stage": dict,
    "memory": dict,
    "recovery": list,
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model directory of two shards and a text."""
    folder = furnished(tmp_path_factory.mktemp("workshop"), blocks=2)
    assert len(list((folder / "model").glob("*.safetensors"))) >= 2
    return folder


@pytest.fixture
def small(workshop: Path, tmp_path: Path) -> list[str]:
    """The overrides of a run of about a second, into a folder of its own."""
    return small_run(workshop, tmp_path / "out")


def records(tmp_path: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*/result.json"))]


def test_a_run_leaves_the_record_of_the_contract_and_is_skipped_the_next_time(small: list[str], tmp_path: Path) -> None:
    small.append("metric=entropy")  # its shuffle leaves orders
    done = launch_anew(*small)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path)
    assert {key: type(record[key]) for key in CONTRACT} == CONTRACT
    assert record["status"] == "finished"
    whole = {"pattern_holds": True, "share_of_blocks": 1.0, "left_dense": {}}
    assert record["sparsity"] == {"pattern": "2:4", "density": 0.5} | whole
    assert set(record["quality"]) == {"text.txt"}
    assert set(record["quality"]["text.txt"]) == {"dense", "pruned", "tokens", "sequence_length", "dense_run", "bos"}
    assert record["quality"]["text.txt"]["tokens"] == 128
    assert len(record["layers"]) == 14
    assert {"name", "shape", "density", "kept_score", "relative_error", "seconds"} <= set(record["layers"][0])
    packed = {"metadata_bits", "bits_per_weight", "packed_bytes", "file_bytes", "order_bytes"}
    contract = {"peak_host_mib", "peak_device_mib", "dense_bytes", "sparse_bytes", "saving"}
    assert set(record["memory"]) == contract | packed
    assert f"{record['quality']['text.txt']['pruned']:.0f}" in done.stdout

    folder = tmp_path / "out" / record["id"]
    masks = audit.read_masks(folder)
    assert set(masks) == {f"{layer['name']}.weight" for layer in record["layers"]}
    files = {"result.json", "status.json", "run.log", "masks.safetensors", "orders.safetensors"}
    files |= {"calibration_tokens.safetensors", "window_losses.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    losses = load_file(folder / "window_losses.safetensors")
    assert losses["pruned/text.txt"].shape == (4,)  # 128 tokens in windows of 32
    assert record["quality"]["text.txt"]["pruned"] == pytest.approx(losses["pruned/text.txt"].mean().exp().item())

    before = (folder / "result.json").stat().st_mtime_ns
    again = launch(*small)
    assert again.returncode == 0
    assert "was run before" in again.stderr
    assert (folder / "result.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_that_is_asked_for_again_ends_with_the_same_bytes(small: list[str], tmp_path: Path) -> None:
    small.append("metric=entropy")  # its shuffle leaves orders
    assert launch(*small).returncode == 0
    (folder,) = (path.parent for path in tmp_path.glob("out/*/result.json"))
    before = (folder / "result.json").stat().st_mtime_ns
    tensors = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    repeated = launch_anew(*small, "rerun=true")  # two threads, and an interpreter of its own
    assert repeated.returncode == 0
    assert (folder / "result.json").stat().st_mtime_ns > before
    # Another process at another moment, in which sets have another order.
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == tensors


def test_all_of_the_816_paper_in_one_run(small: list[str], tmp_path: Path) -> None:
    small = ["-cd", str(ROOT / "experiments"), "-cn", "eight_sixteen", *small]
    done = launch(*small, "outliers=8:32", "recovery.second.epochs=1")
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path)
    assert record["name"] == "model 8:16+8:32 equalise ria variance_block"
    whole = {"pattern_holds": True, "share_of_blocks": 1.0, "left_dense": {}}
    assert record["sparsity"] == {"pattern": "8:16+8:32", "density": 0.75} | whole
    # ceil(log2 C(16, 8)) / 16 and ceil(log2 C(32, 8)) / 32 bits; three quarters of float32 weights.
    assert record["memory"]["metadata_bits"] == 14 / 16 + 24 / 32
    assert record["memory"]["bits_per_weight"] == 24 + 14 / 16 + 24 / 32
    assert [part["name"] for part in record["recovery"]] == ["model.layers.0", "model.layers.1"]
    assert all(part["after"] <= part["before"] for part in record["recovery"])
    assert {"prepare", "recover"} <= set(record["seconds_by_stage"])


def test_a_sweep_measures_the_dense_model_once(small: list[str], tmp_path: Path) -> None:
    assert launch("-m", *small, "metric=wanda,magnitude", "evaluate.length=32,16").returncode == 0
    by_length: dict[int, list[dict]] = {16: [], 32: []}
    for record in records(tmp_path):
        by_length[record["quality"]["text.txt"]["sequence_length"]].append(record)
    # The same 128 tokens in windows of another length are another measurement.
    dense = {length: {r["quality"]["text.txt"]["dense"] for r in of} for length, of in by_length.items()}
    assert [len(values) for values in dense.values()] == [1, 1]
    assert dense[16] != dense[32]
    assert all(
        load_file(tmp_path / "out" / r["id"] / "window_losses.safetensors")["dense/text.txt"].shape == (128 // length,)
        for length, of in by_length.items()
        for r in of
    )
    shutil.rmtree(tmp_path / "out")
    assert launch("-m", *small, "metric=wanda,magnitude").returncode == 0
    qualities = [record["quality"]["text.txt"] for record in records(tmp_path)]
    assert len({quality["dense_run"] for quality in qualities}) == 1
    assert len({quality["dense"] for quality in qualities}) == 1
    assert len({quality["pruned"] for quality in qualities}) > 1
    folders = {record["id"] for record in records(tmp_path)}
    assert {quality["dense_run"] for quality in qualities} <= folders
    losses = [load_file(tmp_path / "out" / folder / "window_losses.safetensors") for folder in folders]
    assert all(torch.equal(loss["dense/text.txt"], losses[0]["dense/text.txt"]) for loss in losses)
    # Nor is it loaded twice; which run was first stands in its record.
    logs = {folder: (tmp_path / "out" / folder / "run.log").read_text() for folder in folders}
    shared = {folder for folder, log in logs.items() if "is as it was loaded for an earlier run" in log}
    assert shared == folders - {quality["dense_run"] for quality in qualities}


def test_a_model_is_kept_only_where_the_next_run_wants_it(tmp_path: Path) -> None:
    def run(name: str, model: str = "a", rerun: bool = False) -> tuple[Path, dict]:
        return tmp_path / name, {"model": {"path": model}, "rerun": rerun}

    (tmp_path / "done").mkdir()
    whole = {"id": "a", "config": {}, "model": {}, "sparsity": {}, "quality": {}, "status": "finished"}
    write_json(tmp_path / "done" / "result.json", whole)
    _, own = run("own")
    assert not attempt._again(own, [])
    assert attempt._again(own, [run("next")])
    assert not attempt._again(own, [run("next", "b"), run("behind")])
    assert not attempt._again(own, [run("done")])
    assert attempt._again(own, [run("done", "b"), run("next")])
    assert attempt._again(own, [run("done", rerun=True)])


def test_memory_is_counted_on_tensors(small: list[str], workshop: Path, tmp_path: Path) -> None:
    assert launch(*small, "shuffle=none", "metric=magnitude").returncode == 0
    memory = records(tmp_path)[0]["memory"]
    weights = {k: v for shard in (workshop / "model").glob("*.safetensors") for k, v in load_file(shard).items()}
    dense = sum(value.nbytes for value in weights.values())
    pruned = sum(value.nbytes for name, value in weights.items() if "proj" in name)
    # float32: half of the values stay, and one bit for each of them.
    assert memory["dense_bytes"] == dense
    assert memory["sparse_bytes"] == dense - pruned + pruned // 2 + pruned // 32
    assert memory["saving"] == pytest.approx(1 - memory["sparse_bytes"] / dense)


@pytest.mark.slow
def test_a_sweep_ends_with_one_table_and_a_failing_run_does_not_stop_it(small: list[str], tmp_path: Path) -> None:
    sweep = ["-m", *small, "metric=magnitude,wanda", "model.skip=[],[nothing_left]", "shuffle=none"]
    sweep[sweep.index("model.skip=[],[nothing_left]")] = "model.skip=[],['']"  # an empty expression skips all
    done = launch(*sweep)
    assert done.returncode == 1
    assert len(records(tmp_path)) == 2
    assert done.stdout.count("no layer would be pruned") == 2
    assert "magnitude" in done.stdout
    assert "wanda" in done.stdout
    again = launch(*sweep[:-3], "metric=magnitude,wanda", "shuffle=none")
    assert again.returncode == 0
    assert again.stderr.count("was run before") == 2


@pytest.mark.slow
def test_a_killed_run_leaves_no_result_and_runs_again(small: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "launch.py"), *small, "calibration.sequences=256", "calibration.length=64"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "block 1" in line:  # in the middle of the block loop
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=60)
    process.stderr.close()
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.name != "sweeps")
    assert json.loads((folder / "status.json").read_text())["status"] == "running"
    assert not (folder / "result.json").exists()
    assert launch(*command[2:]).returncode == 0
    assert (folder / "result.json").exists()


def truncated(folder: Path) -> str:
    shard = sorted((folder / "model").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    return f"{shard} is damaged or cut short"


def test_a_text_that_was_calibrated_on_is_told_in_a_warning(small: list[str], workshop: Path) -> None:
    done = launch(*small, f"evaluate.path={workshop / 'text.txt'}")
    assert done.returncode == 0 and "100 % of the calibration is in the evaluation text text.txt" in done.stderr


def lost_shard(folder: Path) -> str:
    shard = sorted((folder / "model").glob("*.safetensors"))[-1]
    shard.unlink()
    return f"shards: {shard.name}"


def lost_weight(folder: Path) -> str:
    index_path = folder / "model" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / "model" / index["weight_map"].pop(name)
    weights = load_file(shard)
    del weights[name]
    save_file(weights, shard, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))
    return f"lacks 1 weights that LlamaForCausalLM needs ({name}"


def damaged_weight(folder: Path) -> str:
    for shard in (folder / "model").glob("*.safetensors"):
        weights = load_file(shard)
        for name in weights:
            if name == "model.layers.0.mlp.up_proj.weight":
                weights[name][0, 0] = float("nan")
                save_file(weights, shard, metadata={"format": "pt"})
    return "NaN or Inf"


def overflowing_activations(folder: Path) -> str:
    for shard in (folder / "model").glob("*.safetensors"):
        weights = load_file(shard)
        for name in weights:
            if name == "model.layers.0.post_attention_layernorm.weight":
                weights[name] *= 1e30  # gate times up overflows float32
                save_file(weights, shard, metadata={"format": "pt"})
    return "the output of model.layers.0 holds NaN or Inf"


def no_weights(folder: Path) -> str:
    for shard in (folder / "model").glob("*.safetensors*"):
        shard.unlink()
    return "has no weights"


def no_config(folder: Path) -> str:
    (folder / "model" / "config.json").unlink()
    return "it has no config.json"


def short_text(folder: Path) -> str:
    (folder / "text.txt").write_text("Too short.")
    return "too few for one sequence of 16"


def no_text(folder: Path) -> str:
    (folder / "text.txt").unlink()
    return f"expected a text file at {folder / 'text.txt'}"


DAMAGES = [truncated, lost_weight, damaged_weight, overflowing_activations, short_text]


def encoder_with_decoder(folder: Path) -> str:
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"model_type": "t5", "is_encoder_decoder": True}))
    return "is an encoder with a decoder (t5): esparse prunes decoder-only models"


def packed_already(folder: Path) -> str:
    config = json.loads((folder / "model" / "config.json").read_text())
    packed = {"quantization_config": {"quant_method": "esparse"}}
    (folder / "model" / "config.json").write_text(json.dumps(config | packed))
    return "is packed by esparse (export=packed) and is pruned already: give the original model"


def wide_text(folder: Path) -> str:
    (folder / "text.txt").write_text("wide " * 99, encoding="utf-16")
    return "text.txt is UTF-16 text: convert it"


# By names, and by how files begin, before torch is loaded.
FORESEEN = [lost_shard, no_weights, no_config, no_text, encoder_with_decoder, packed_already, wide_text]


@pytest.mark.tries(2)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_input_ends_in_one_sentence(
    damage: Callable[[Path], str], small: list[str], workshop: Path, tmp_path: Path
) -> None:
    shutil.copytree(workshop, tmp_path / "shop")
    sentence = damage(tmp_path / "shop")
    done = launch(*(argument.replace(str(workshop), str(tmp_path / "shop")) for argument in small))
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) <= 2  # the run's name and folder, and the sentence
    (status,) = (tmp_path / "out").glob("*/status.json")
    assert json.loads(status.read_text())["status"] == "failed"
    assert not records(tmp_path)


@pytest.mark.tries(2)
@pytest.mark.parametrize("damage", FORESEEN, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("sweep", [False, True])
def test_a_file_that_is_not_there_ends_a_call_or_a_sweep_once(
    sweep: bool, damage: Callable[[Path], str], small: list[str], workshop: Path, tmp_path: Path
) -> None:
    shutil.copytree(workshop, tmp_path / "shop")
    sentence = damage(tmp_path / "shop")
    words = [argument.replace(str(workshop), str(tmp_path / "shop")) for argument in small]
    done = launch(*(["-m", "metric=wanda,magnitude,ria", *words] if sweep else words))
    assert done.returncode == 2
    assert done.stderr.startswith("esparse: ") and sentence in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*/status.json"))


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate=text", "evaluate.path=/nope.txt"], "expected a text file at /nope.txt, found nothing there"),
        (["calibration=text", "calibration.path=/tmp", "dry_run=a100"], "expected a text file at /tmp, found a folder"),
        (["calibration=text", "calibration.path=/bin/sh"], "expected a file that ends in one of .txt"),
        (["calibration.length=9999"], "calibration.length"),
    ],
)
def test_a_dry_run_sees_what_a_run_could_not_read(words: list[str], said: str) -> None:
    done = launch("dry_run=true", *words)
    assert (done.returncode, said in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_finished_run_needs_its_files_no_more(small: list[str], workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop, tmp_path / "shop")
    words = [argument.replace(str(workshop), str(tmp_path / "shop")) for argument in small]
    assert launch(*words).returncode == 0
    shutil.rmtree(tmp_path / "shop")
    assert "was run before" in launch(*words).stderr
    assert launch(*words, "rerun=true").returncode == 2


@pytest.mark.skipif(foresight.gpu_is_there(), reason="asks for what this machine has")
@pytest.mark.parametrize(("word", "said"), [("model.devices=cuda:99", "asks for a GPU"), ("bench=gemm", "on a GPU")])
def test_a_gpu_that_is_not_there(word: str, said: str) -> None:
    done = launch(word)
    assert (done.returncode, said in done.stderr) == (2, True)


@pytest.mark.tries(4)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.devices=gpu"], "got 'gpu': did you mean cuda?"),
        (["model.devices=tpu9"], "model.devices must be auto, cpu, cuda or cuda:N"),
        (["model.devices=cpu:0"], "got 'cpu:0'"),
        (["model.devices=cpu:9999"], "model.devices=cpu:9999 asks for 9999 processes, each with libraries and hidden"),
        (["model=hf", "model.path=/nowhere/model"], "there is no directory /nowhere/model"),
        (
            ["model=hf", "model.path=nobody/nothing"],
            "is neither a local directory nor in reach on the Hugging Face hub",
        ),
        (["model=hf", "model.path='a name'"], "is neither a directory nor a name on the Hugging Face hub"),
        (["model=hf", f"model.path={__file__}"], "is a file, and a model is a directory"),
        (["calibration.length=257"], "calibration.length=257 is longer than the 256 tokens that the model takes"),
        (["evaluate.length=257"], "evaluate.length=257 is longer than the 256 tokens that the model takes"),
        (["evaluate=text", f"evaluate.path={__file__}"], "expected a file that ends in one of .txt"),
        (["output_root=/dev/null/out"], "/dev/null is no folder"),
        (
            ["recovery=dsnot", "recovery.skip=[mpl]"],
            "recovery.skip: 'mpl' is found in no name inside the model's blocks",
        ),
        (
            ["model.skip=[o_proj,upproj]"],
            "'upproj' is found in no name inside the model's blocks, such as model.layers.0",
        ),
        (["export=packed", f"export.path={Path(__file__).parent}"], "is there already, and is no export of esparse"),
        (["export=packed", "export.path=/proc/x"], "export.path=/proc/x: nothing can be written to /"),
        (["output_root=/proc/x"], "output_root=/proc/x: nothing can be written to /proc"),
        (["-m", "hydra/launcher=site", "seed=1,2"], "there is no sbatch on this machine"),
    ],
)
def test_what_can_be_known_is_known_before_torch_is_loaded(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without sbatch
    done = launch(*words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("esparse: ") and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluate=wikitext2", "evaluate.path=null"], "evaluate=text evaluate.path=FILE"),
    ],
)
def test_what_is_not_there_is_named(small: list[str], overrides: list[str], sentence: str) -> None:
    kept = [a for a in small if a.split("=")[0] not in {o.split("=")[0] for o in overrides}]
    done = launch(*kept, *overrides)
    assert done.returncode == 1, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.tries(6)
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["pattern=4:2"], ["0 < n < m", "'4:2'"]),
        (["hydra.launcher=a100"], ["hydra/launcher=a100 chooses it"]),
        (["model.path=/x/step=1000"], ["""'model.path="/x/step=1000"'"""]),
        (["-m", "export=packed", "export.path=X", "seed=1,2"], ["is one folder for 2 runs of the sweep"]),
        (["-m", "metric=wanda,magnitude", "export=packed", "export.path=X,./X"], ["one folder for 4 runs"]),
        (["pattern=124"], ["in YAML write it in quotes"]),
        (["metric=wandaa"], ["there is no metric 'wandaa': did you mean wanda?", "magnitude"]),
        (["zeroshot=piqa"], ["tasks are named by zeroshot.tasks=[piqa], not by zeroshot=piqa"]),
        (["-m", "zeroshot=[hellaswag,piqa]"], ["tasks are named by zeroshot.tasks=[hellaswag,piqa]"]),
        (["zeroshot=[builtin,esparse]"], ["zeroshot takes one option", "by zeroshot.tasks=[builtin,esparse]"]),
        (["metric.damb=1"], ["there is no setting metric.damb: did you mean metric.damp?"]),
        (["metric=entropy", "metric.bins=many"], ["metric.bins takes a whole number, got 'many'"]),
        (["metric=esparse_paper", "metric.norm=l2"], ["metric.norm must be one of sequence, rms, total"]),
        (["shuffle=esparse", "shuffle.block=7"], ["shuffle.block=7", "at least 8"]),
        (["update=swap", "pattern=50%"], ["update=swap", "needs an n:m pattern"]),
        (["model=hf"], ["model.path"]),
        (["calibration=text"], ["calibration.path"]),
        (["seed=-1"], ["seed must be between"]),
        (["tracking.artifacts=[checkpoint]"], ["uploads what export writes", "use export=dense or export=packed"]),
        (["-m", "metric=entropy,wanda", "pattern=2:4,3:2"], ["0 < n < m", "'3:2'"]),
        (["-m", "metric=magnitude,wanda", "model.skip=[o_proj],[act_fn]"], ["'act_fn' is found in no name"]),
        (["-m", "metric=entropy,wanda", "metric.bins=50"], ["metric.bins"]),
    ],
)
def test_a_mistake_on_the_command_line_stops_before_any_work(
    arguments: list[str], parts: list[str], tmp_path: Path
) -> None:
    done = launch(*arguments, f"output_root={tmp_path / 'out'}")
    assert done.returncode == 2, done.stderr
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.glob("out/*/status.json"))


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence_and_the_run_can_be_repeated(small: list[str], tmp_path: Path) -> None:
    def limited() -> None:  # no file may grow beyond 4 KiB: writing a block fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    done = launch_anew(*small, preexec_fn=limited)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert "pruned-00000.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.part"))
    assert not records(tmp_path)
    assert launch(*small).returncode == 0
    assert len(records(tmp_path)) == 1


@pytest.mark.slow
def test_too_little_memory_ends_in_one_sentence(tmp_path: Path) -> None:
    def limited() -> None:  # libraries and tokens take 1.5 GB of addresses, the hidden states alone 0.7
        resource.setrlimit(resource.RLIMIT_AS, (1_900_000_000, 1_900_000_000))

    many = ["calibration.sequences=3600", "model.activations=host", "evaluate=none", "tracking=none"]
    done = launch_anew(*many, f"output_root={tmp_path / 'out'}", preexec_fn=limited)
    assert done.returncode == 1, done.stderr
    assert "not enough memory" in done.stderr
    assert "model.store=shards" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_width_that_m_does_not_divide_is_handled(small: list[str], tmp_path: Path) -> None:
    done = launch(*small, "pattern=3:7")  # widths of 32 and 64: tails of 4 and 1
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path)
    assert record["sparsity"]["pattern_holds"]
    assert record["sparsity"]["density"] > 3 / 7


@pytest.mark.slow
def test_a_wandb_server_that_is_not_there_does_not_stop_a_run(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    online = ["tracking=wandb", "tracking.mode=online", "tracking.timeout_s=5"]
    done = launch(*(a for a in small if a != "tracking=none"), *online)
    assert done.returncode == 0, done.stderr
    assert "could not be reached" in done.stderr
    assert "wandb sync" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(records(tmp_path)) == 1


@pytest.mark.slow
def test_glob_in_a_sweep(small: list[str], tmp_path: Path) -> None:
    words = ["metric=glob([w*,m*])", "update=glob(*,exclude=[a*,j*,o*,r*,s*])", "shuffle=none", "dry_run=true"]
    done = launch("-m", *small, *words)
    assert done.returncode == 0, done.stderr
    plans = [line for line in done.stdout.splitlines() if line.startswith("plan of")]
    assert [next(m for m in ("magnitude", "wanda") if m in plan) for plan in plans] == ["magnitude", "wanda"]


@pytest.mark.slow
def test_the_home_directory_in_output_root(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    done = launch("-m", *small[:-1], "seed=1,2", 'output_root="~/out"', cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "home" / "out").glob("*/result.json"))) == 2
    assert list((tmp_path / "home" / "out" / "sweeps").iterdir()) and not list((tmp_path / "here").iterdir())


def test_finished_runs_are_skipped_in_a_moment(small: list[str]) -> None:
    assert launch(*small).returncode == 0
    code = (
        f"import runpy, sys, atexit; sys.argv = ['launch.py', *{small!r}]\n"
        "atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\n"
        "runpy.run_path('launch.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "TORCH False" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [False, True])
def test_a_home_folder_is_meant_by_every_path(
    sweep: bool, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(workshop / "model", tmp_path / "model")
    shutil.copy(workshop / "text.txt", tmp_path / "text.txt")
    shutil.copytree(workshop / "held", tmp_path / "held")
    (tmp_path / "here").mkdir()
    words = [word.replace(str(workshop), "~") for word in small_run(workshop, tmp_path)]
    words = [f"{key}='{value}'" if "~" in value else word for word in words for key, _, value in [word.partition("=")]]
    words = [word for word in words if not word.startswith("output_root")] + [
        "output_root='~/out'",
        "export=dense",
        "shuffle=none",
    ]
    words = ["-m", *words, "metric=wanda,magnitude"] if sweep else [*words, "export.path='~/exported'"]
    done = launch(*words, cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*/result.json"))) == (2 if sweep else 1)
    assert not list((tmp_path / "here").iterdir())
    assert sweep or (tmp_path / "exported" / "config.json").is_file()
