"""Weights read block by block from a checkpoint: bit for bit what a model in memory gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from esparse.allocations.owl import Owl
from esparse.evaluate.perplexity import window_losses
from esparse.metrics import Metric
from esparse.metrics.gradient import Gradient
from esparse.metrics.wanda import Wanda
from esparse.models.blocks import BlockModel
from esparse.models.host_memory import free_host_bytes
from esparse.models.load import BUILTIN, Model, load
from esparse.patterns import NM, Unstructured
from esparse.prepare.equalise import Equalise
from esparse.pruning.method import Method
from esparse.pruning.prune import Pruned, prune
from esparse.records.report import Stages
from esparse.recoveries import NoRecovery, Recovery
from esparse.recoveries.bias import Bias
from esparse.recoveries.window import Window
from esparse.shuffles import NoShuffle
from tests.models.families import tiny
from tests.recoveries.test_distill import FULL

CPU = torch.device("cpu")
TOKENS_SL = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(5))

TRAINED = Window(
    window="submodule",
    inputs="dense",
    targets="parent",
    train="all",
    learning_rate=1e-3,
    scaled=False,
    final_rate=0.1,
    decay="linear",
    warm_up=0.0,
    epochs=2,
    batch=2,
    beta2=0.95,
    weight_decay=0.0,
    clip=None,
    products="auto",
)


def settings(folder: Path, store: str, dtype: str = "auto") -> Model:
    return Model(
        name=None,
        path=str(folder),
        revision=None,
        dtype=dtype,
        devices="cpu",
        batch_tokens=24,
        store=store,
        activations="host",
        skip=[],
        trust_remote_code=False,
    )


def saved(model: PreTrainedModel, folder: Path, form: str) -> Path:
    """The model as a checkpoint: one file, several shards, PyTorch's files, or without the head's prefix in names."""
    model.save_pretrained(folder, max_shard_size="20KB" if form == "shards" else "1GB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / file, folder)
    weights = model.state_dict()
    if form == "headless":
        weights = {name.removeprefix(f"{model.base_model_prefix}."): value for name, value in weights.items()}
    if form in ("bin", "headless"):
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    if form == "bins":
        (folder / "model.safetensors").unlink()
        parts = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(weights)}
        for part in set(parts.values()):
            torch.save({name: weights[name] for name in weights if parts[name] == part}, folder / part)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    return folder


def tied(family: str) -> PreTrainedModel:
    model = tiny(family)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def opened(folder: Path, store: str, dtype: str = "auto") -> BlockModel:
    model, _, weights = load(settings(folder, store, dtype), folder / f"blocks-{store}")
    return BlockModel(model, device=CPU, batch_tokens=24, store=weights)


def everything(blocks: BlockModel) -> dict[str, torch.Tensor]:
    """All parameters, each as it is in its turn."""
    found = {}
    with blocks.ends_resident():
        ends = {name: p for name, p in blocks.model.state_dict().items() if p.device.type != "meta"}
        found |= {name: value.clone() for name, value in ends.items()}
    for index in range(len(blocks.blocks)):
        with blocks.resident(index) as block:
            found |= {f"{blocks.prefix}.{index}.{n}": value.clone() for n, value in block.state_dict().items()}
    return found


def pruned(
    blocks: BlockModel, metric: Metric | None = None, recovery: Recovery | None = None, *, equalised: bool = False
) -> Pruned:
    method = Method(metric=metric or Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), recovery=recovery or NoRecovery())
    if equalised:
        method.prepare = Equalise(power=0.5)
    return prune(blocks, TOKENS_SL, method, stages=Stages())


def assert_same(blocks: BlockModel, expected: BlockModel, **how: object) -> None:
    """Dense losses, weights, masks, reports, pruned losses and pruned weights, all bit for bit."""
    assert expected.store.whole
    assert not blocks.store.whole
    assert torch.equal(window_losses(blocks, TOKENS_SL), window_losses(expected, TOKENS_SL))
    dense, dense_expected = everything(blocks), everything(expected)
    assert dense.keys() == dense_expected.keys() == expected.model.state_dict().keys()
    assert all(torch.equal(dense[name], value) for name, value in dense_expected.items())
    assert all(dense[name].dtype == value.dtype for name, value in dense_expected.items())
    got, wanted = pruned(blocks, **how), pruned(expected, **how)  # type: ignore[arg-type]
    assert got.keeps.keys() == wanted.keeps.keys()
    assert all(torch.equal(got.keeps[name], keep) for name, keep in wanted.keeps.items())
    assert [layer.relative_error for layer in got.layers] == [layer.relative_error for layer in wanted.layers]
    for field in ("weights", "kept", "pattern_holds", "metadata_bits"):
        assert getattr(got, field) == getattr(wanted, field)
    assert torch.equal(window_losses(blocks, TOKENS_SL), window_losses(expected, TOKENS_SL))
    after, after_expected = everything(blocks), everything(expected)
    assert after.keys() == after_expected.keys()
    assert all(torch.equal(after[name], value) for name, value in after_expected.items())
    assert any(not torch.equal(after[name], value) for name, value in dense.items())
    assert all(p.device.type == "meta" for p in blocks.model.parameters())


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", "shards"),
        ("llama", "one"),
        ("llama", "bin"),
        ("qwen2", "bins"),
        ("opt", "shards"),
        ("bloom", "headless"),
        ("gpt2", "headless"),
        ("gemma3", "shards"),
        ("falcon-alibi", "shards"),
        ("phi3", "one"),
    ],
)
@pytest.mark.tries(4)
def test_shards_give_what_memory_gives(family: str, form: str, tmp_path: Path) -> None:
    folder = saved(tiny(family), tmp_path, form)
    assert_same(opened(folder, "shards"), opened(folder, "memory"))


@pytest.mark.parametrize("form", ["shards", "bin"])
def test_tied_weights_are_one_weight(form: str, tmp_path: Path) -> None:
    folder = saved(tied("qwen2"), tmp_path, form)
    blocks = opened(folder, "shards")
    assert_same(blocks, opened(folder, "memory"))
    with blocks.ends_resident():
        assert blocks.model.lm_head.weight is blocks.model.get_input_embeddings().weight


def test_tied_weights_that_differ_on_disk_are_refused(tmp_path: Path) -> None:
    model = tiny("qwen2")
    model.config.tie_word_embeddings = True
    folder = saved(model, tmp_path, "bin")
    with pytest.raises(ValueError, match=r"are one weight in the model and differ on disk.*model.store=memory"):
        opened(folder, "shards")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("on_disk", [torch.float16, torch.bfloat16, torch.float32])
def test_precisions(on_disk: torch.dtype, dtype: str, tmp_path: Path) -> None:
    model = tiny("llama").to(on_disk)
    folder = saved(model, tmp_path, "one")
    assert_same(opened(folder, "shards", dtype), opened(folder, "memory", dtype))


def test_the_config_decides_over_the_files_about_precision(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path, "one")
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(opened(folder, "shards"), opened(folder, "memory"))


@pytest.mark.parametrize(
    "how",
    [
        {"metric": Gradient(source="block", alpha=100.0)},
        {"recovery": TRAINED},
        {"recovery": Bias()},
        {"equalised": True},
    ],
)
@pytest.mark.tries(3)
def test_methods_that_change_more_than_weights(how: dict[str, object], tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path, "shards")
    assert_same(opened(folder, "shards"), opened(folder, "memory"), **how)


def test_a_preparation_made_while_allocations_are_measured_lasts(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path, "shards")
    results = []
    for store in ("shards", "memory"):
        blocks = opened(folder, store)
        owl = Owl(threshold=5.0, spread=0.08, per="block")
        method = Method(
            metric=Wanda(),
            pattern=Unstructured(50),
            shuffle=NoShuffle(),
            prepare=Equalise(power=0.5),
            allocation=owl,
        )
        results.append((prune(blocks, TOKENS_SL, method, stages=Stages()), everything(blocks)))
    (got, weights), (wanted, weights_wanted) = results
    assert all(torch.equal(got.keeps[name], keep) for name, keep in wanted.keeps.items())
    assert all(torch.equal(weights[name], value) for name, value in weights_wanted.items())


def test_a_layer_keeps_the_bias_it_was_given(tmp_path: Path) -> None:
    blocks = opened(saved(tiny("llama"), tmp_path, "shards"), "shards")
    pruned(blocks, recovery=Bias())
    with blocks.resident(1) as block:
        assert block.mlp.down_proj.bias.abs().sum() > 0


def test_what_is_not_said_to_be_changed_is_forgotten(tmp_path: Path) -> None:
    blocks = opened(saved(tiny("llama"), tmp_path, "shards"), "shards")
    with blocks.resident(0) as block:
        parameter = block.mlp.up_proj.weight
        before = parameter.detach().clone()
        parameter.data.zero_()
    with pytest.raises(ZeroDivisionError), blocks.resident(0, changed="pruned") as block:
        parameter.data.zero_()
        raise ZeroDivisionError
    assert parameter.device.type == "meta"
    assert not (tmp_path / "blocks-shards").exists()
    with blocks.resident(0, changed="pruned"):
        assert torch.equal(parameter, before)
        parameter.data.zero_()
    with blocks.resident(0):
        assert not parameter.any()
    assert [file.name for file in (tmp_path / "blocks-shards").iterdir()] == ["pruned-00000.safetensors"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    blocks = opened(saved(tiny("llama"), tmp_path, "shards"), "shards")
    (tmp_path / "blocks-shards" / "pruned-00001.safetensors").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot write .*pruned-00001"), blocks.resident(1, changed="pruned"):
        pass


@pytest.mark.parametrize(("family", "named"), [("mixtral", "layers.0.mlp"), ("gpt-neox", "lm_head.weight")])
def test_what_transformers_converts_or_renames_is_refused(family: str, named: str, tmp_path: Path) -> None:
    folder = saved(tiny(family), tmp_path, "one")
    with pytest.raises(ValueError, match=rf"{named}.* under the model's name for it.*use model.store=memory"):
        opened(folder, "shards")


def test_a_weight_of_two_blocks_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path, "one")
    model, _, store = load(settings(folder, "shards"), folder / "blocks")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"model.layers.1 shares weights.*use model.store=memory"):
        BlockModel(model, device=CPU, batch_tokens=24, store=store)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path, "one")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"is \[48, 32\] in the checkpoint .*, and \[40, 32\] by its config.json: one of the two files"
    ):
        opened(folder, "shards")


def test_a_file_in_pytorchs_old_format_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path, "bin")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read tensor by tensor.*model.store=memory"):
        opened(folder, "shards")


@pytest.mark.parametrize(
    "method",
    [
        Method(metric=Gradient(source="model", alpha=1.0), pattern=NM(2, 4), shuffle=NoShuffle()),
        Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle(), recovery=FULL),
    ],
)
def test_what_needs_the_whole_model_is_refused(method: Method, tmp_path: Path) -> None:
    blocks = opened(saved(tiny("llama"), tmp_path, "one"), "shards")
    with pytest.raises(ValueError, match=r"the whole model, which is read block by block.*use model.store=memory"):
        prune(blocks, TOKENS_SL, method, stages=Stages())


@pytest.mark.parametrize(("free", "whole"), [(2.1, True), (1.9, False)])
def test_auto_streams_what_takes_more_than_half_of_the_memory(
    free: float, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny("llama"), tmp_path, "shards")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    monkeypatch.setattr("esparse.models.host_memory.free_host_bytes", lambda: int(free * size))
    assert opened(folder, "auto").store.whole is whole


def test_the_free_memory_is_a_part_of_the_machines() -> None:
    assert 2**20 < free_host_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_of_the_process_counts() -> None:
    code = (
        "import resource; from esparse.models.host_memory import free_host_bytes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\n"
        "print(free_host_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert 0 < int(done.stdout) < 2**28 - 2**20


def test_a_broken_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.store must be one of auto, memory, shards, got 'disk'"):
        settings(tmp_path, "disk")
