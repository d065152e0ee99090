"""What transformers loads is loaded; all else is one sentence at once, with what came and what to do."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from esparse.errors import Mistake
from esparse.models.blocks import BlockModel
from esparse.models.forward_check import check
from esparse.models.inputs import check_hub
from esparse.models.load import BUILTIN, Model, load, longest_sequence
from tests.models.families import FAMILIES, SMALL, tiny

MLA = {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
MLA |= {"n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
MLA |= {"qk_nope_head_dim": 8, "first_k_dense_replace": 1}
NAME = "model.layers.0.mlp.up_proj.weight"


def model_of(path: Path, **settings: Any) -> Model:
    usual = {"name": None, "path": str(path), "revision": None, "dtype": "auto", "devices": "cpu", "batch_tokens": None}
    usual |= {"store": "memory", "activations": "auto", "skip": [], "trust_remote_code": False}
    return Model(**(usual | settings))


def opened(path: Path, **settings: Any) -> PreTrainedModel:
    return load(model_of(path, **settings), path / "blocks")[0]


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, tmp_path / "model")
    return tmp_path / "model"


def index_of(folder: Path, index: str, shard: str) -> None:
    names = load_file(folder / "model.safetensors")
    parts = {name: shard.format(1 + i % 2) for i, name in enumerate(names)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": parts}))


def stale_bin_index(folder: Path) -> None:
    index_of(folder, "pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin")


def stale_index(folder: Path) -> None:
    index_of(folder, "model.safetensors.index.json", "model-0000{}-of-00002.safetensors")


def damaged_stale_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def index_of_something_else(folder: Path) -> None:
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": {"a": "flax-00001.msgpack"}}))


def old_bin(folder: Path) -> None:
    torch.save(
        load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    (folder / "model.safetensors").unlink()


def damaged_bin_beside(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cut short")


def shards_under_other_names(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """Two shards, whose index does not say what is in them."""

    def changed(folder: Path) -> None:
        tensors, index = load_file(folder / "model.safetensors"), folder / "model.safetensors.index.json"
        stale_index(folder)
        parts = json.loads(index.read_text())["weight_map"]
        for shard in sorted(set(parts.values())):
            save_file({n: t for n, t in tensors.items() if parts[n] == shard}, folder / shard, {"format": "pt"})
        change(parts)
        index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
        (folder / "model.safetensors").unlink()

    return changed


index_lacks_a_weight = shards_under_other_names(lambda parts: parts.pop(NAME))
index_names_another_shard = shards_under_other_names(
    lambda parts: parts.update({NAME: next(shard for shard in parts.values() if shard != parts[NAME])})
)
GOOD = [stale_bin_index, stale_index, damaged_stale_index, index_of_something_else, old_bin, damaged_bin_beside]
GOOD += [index_lacks_a_weight, index_names_another_shard]


@pytest.mark.parametrize("store", ["auto", "memory"])
@pytest.mark.parametrize("change", GOOD)
def test_what_transformers_loads_is_loaded(change: Callable[[Path], None], store: str, folder: Path) -> None:
    expected = tiny("llama").state_dict()
    change(folder)
    found = opened(folder, store=store).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("change", [index_lacks_a_weight, index_names_another_shard])
def test_shards_that_an_index_tells_wrongly_are_read_block_by_block(
    change: Callable[[Path], None], folder: Path
) -> None:
    expected = tiny("llama").state_dict()
    change(folder)
    skeleton, _, store = load(model_of(folder, store="shards"), folder / "blocks")
    found = dict(skeleton.named_parameters())
    store.lend(found, torch.device("cpu"))
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name in found)


@pytest.mark.parametrize("store", ["memory", "shards"])
def test_generation_settings_come_with_the_model(store: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 3], "do_sample": true, "top_p": 0.9}')
    found = opened(folder, store=store).generation_config
    assert (found.eos_token_id, found.top_p) == ([0, 3], 0.9)
    for text in (None, "{"):
        (folder / "generation_config.json").write_text(text) if text else (folder / "generation_config.json").unlink()
        assert opened(folder, store=store).generation_config.eos_token_id == 0
        assert ("generation_config.json is damaged: it is no JSON" in caplog.text) == bool(text)


def quantised(method: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, quantization_config={"quant_method": method, "bits": 4})


def adapter(folder: Path) -> None:
    for file in folder.glob("*"):
        file.unlink()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return changed


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def only(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")

    return change


def shard_gone(folder: Path) -> None:
    stale_index(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def link_to_nothing(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("../blobs/0")

    return change


WRONG: dict[str, Callable[[Path], Any]] = {
    "is quantised (awq): a pruning needs weights in 16 or 32 bits": quantised("awq"),
    "is quantised (gptq)": quantised("gptq"),
    "is quantised (compressed-tensors)": quantised("compressed-tensors"),
    "is quantised (bitsandbytes)": quantised("bitsandbytes"),
    "is quantised (fp8)": quantised("fp8"),
    "is quantised (mxfp4)": quantised("mxfp4"),
    "is quantised (by its config.json)": lambda f: edit(f, compression_config={"format": "pack-quantized"}),
    "is packed by esparse (export=packed) and is pruned already: give the original model": quantised("esparse"),
    f"holds quantised weights ({NAME} is I8)": weights(lambda t: t.update({NAME: t[NAME].to(torch.int8)})),
    f"holds quantised weights ({NAME} is F8_E4M3)": weights(
        lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)})
    ),
    "holds an adapter (LORA) of meta-llama/Llama-2-7b-hf: merge it into that model first": adapter,
    "config.json is a pointer of Git LFS": lambda f: (f / "config.json").write_text(POINTER),
    "model.safetensors is a pointer of Git LFS and not the file": lambda f: (f / "model.safetensors").write_text(
        POINTER
    ),
    "tokenizer.json is a pointer of Git LFS and not the file": lambda f: (f / "tokenizer.json").write_text(POINTER),
    "FOLDER is an encoder with a decoder (t5): esparse prunes decoder-only models": lambda f: edit(
        f, model_type="t5", is_encoder_decoder=True
    ),
    "has no weights: neither *.safetensors nor *.bin; it holds a GGUF file": only("model.gguf"),
    "it holds weights in the format of the authors' own code": only("consolidated.00.pth"),
    "it holds weights of TensorFlow": only("tf_model.h5"),
    "it has part.safetensors, but neither model.safetensors nor": only("part.safetensors"),
    "it has no config.json; a model lies in its folder final: name that one": lambda f: (
        (f / "config.json").unlink(),
        (f / "final").mkdir(),
        (f / "final" / "config.json").write_text("{}"),
    ),
    "lacks 1 of 2 shards: model-00002-of-00002.safetensors (model.safetensors.index.json names them)": shard_gone,
    "model.safetensors is damaged or cut short": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-9]
    ),
    "FOLDER has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json": without_tokenizer,
    "the tokenizer in FOLDER cannot be loaded: 'added_tokens' (KeyError in transformers): one": lambda f: (
        f / "tokenizer.json"
    ).write_text("{}"),
    "_tokens.weight is [96, 32] in the checkpoint FOLDER, and [90, 32] by its config.json: one of": lambda f: edit(
        f, vocab_size=90
    ),
    "FOLDER lacks 9 weights that LlamaForCausalLM needs (model.layers.3.": lambda f: edit(f, num_hidden_layers=4),
    "config.json is damaged: expected one JSON object, got a list": lambda f: (f / "config.json").write_text("[]"),
    "config.json is damaged: it is no JSON (": lambda f: (f / "config.json").write_text('{"model_type"'),
    "model.safetensors is a link to ../blobs/0, where nothing is: a hub's cache keeps": link_to_nothing(
        "model.safetensors"
    ),
    "tokenizer.json is a link to ../blobs/0, where nothing is": link_to_nothing("tokenizer.json"),
    "has Python code of its own: read it, and allow it with model.trust_remote_code=true": lambda f: edit(
        f,
        model_type="own",
        auto_map={"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},
    ),
}


@pytest.mark.parametrize("store", ["memory", "shards"])
@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_pruned_is_one_sentence(words: str, store: str, folder: Path) -> None:
    WRONG[words](folder)
    with pytest.raises((Mistake, FileNotFoundError)) as raised:
        opened(folder, store=store)
    said = str(raised.value)
    assert words.replace("FOLDER", str(folder)) in said
    assert said.count("cannot be loaded") <= 1  # one sentence, not two
    assert "model.store=memory" not in said
    assert "\n" not in said


def test_an_adapter_on_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path)
    there = {"adapter_config.json": str(tmp_path / "adapter_config.json")}
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda path, name, **how: there.get(name))
    with pytest.raises(Mistake, match=r"me/mine holds an adapter \(LORA\) of meta-llama/Llama-2-7b-hf"):
        check_hub("me/mine", None)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "olmo", "gpt_neox"])
def test_a_tokenizer_without_a_vocabulary_is_refused_with_both_numbers(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **(SMALL | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has a vocabulary of [0-8] tokens, and the model one of 96: its files"):
        opened(tmp_path)


@pytest.mark.parametrize("store", ["memory", "shards"])
def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_said(
    store: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "esparse"):
        opened(folder, store=store)
    assert "has 1024 tokens and the model embeds 96: a text with one of the other tokens is refused" in caplog.text


@pytest.mark.parametrize(
    "name", ["max_seq_len", "n_ctx", "seq_length", "max_sequence_length", "n_positions", "context_length"]
)
def test_the_number_of_positions_has_many_names(name: str) -> None:
    model = tiny("bloom")
    assert longest_sequence(model) == 2048
    setattr(model.config, name, 77)
    assert longest_sequence(model) == 77


@pytest.mark.parametrize("store", ["memory", "shards"])
def test_tensors_without_a_place_are_named(store: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(32, 64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of an old version

    weights(add)(folder)
    with caplog.at_level(logging.WARNING, "esparse"):
        opened(folder, store=store)
    assert (
        "LlamaForCausalLM has no place for 1 tensors of its checkpoint (model.layers.3.eh_proj.weight)" in caplog.text
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_missed_of_a_family_of_ours(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny(family).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, tmp_path)
    with caplog.at_level(logging.WARNING, "esparse"):
        opened(tmp_path)
    assert "has no place for" not in caplog.text


@pytest.mark.parametrize("store", ["memory", "shards"])
def test_what_a_family_keeps_in_float32_stays_so(store: str, tmp_path: Path) -> None:
    """DeepSeek's biases of the router: rounded to half precision, several are one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("deepseek_v3", **(SMALL | MLA))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, tmp_path)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    weights(lambda t: t.update({bias: torch.tensor([8.00001, 8.00002, 7.9999, 8.0])}))(tmp_path)
    try:
        found, _, kept = load(model_of(tmp_path, store=store), tmp_path / "blocks")
    except ValueError as error:  # the experts of this family are converted while they are loaded
        assert store == "shards" and "use model.store=memory" in re.sub(r"\s+", " ", str(error))  # noqa: PT017
        return
    blocks = BlockModel(found, device=torch.device("cpu"), batch_tokens=64, store=kept)
    with blocks.resident(1):
        assert found.get_buffer(bias).dtype == torch.float32
        assert found.get_buffer(bias).tolist() == pytest.approx([8.00001, 8.00002, 7.9999, 8.0], abs=1e-6)


@pytest.mark.parametrize("store", ["memory", "shards"])
def test_a_configuration_that_asks_for_tuples_is_read(store: str, folder: Path) -> None:
    edit(folder, return_dict=False)
    model, _, held = load(model_of(folder, store=store), folder / "blocks")
    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=64, store=held)
    check(blocks, torch.randint(1, 96, (2, 16)))
    assert blocks.checked
