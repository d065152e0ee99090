"""Exports of small models of several families: what is loaded computes what the pruned model did."""

from __future__ import annotations

import json
import logging
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import esparse
from esparse import option, patterns
from esparse.evaluate.perplexity import window_losses
from esparse.export import Export, Finished, card, writer
from esparse.export.dense_checkpoint import Dense
from esparse.export.packed_checkpoint import Packed, why_dense
from esparse.metrics.wanda import Wanda
from esparse.models.block import Block
from esparse.models.blocks import BlockModel
from esparse.models.load import BUILTIN
from esparse.models.matrices import Matrix
from esparse.models.reorder import Reordered, reorder
from esparse.packed import layer as packed_layer
from esparse.packed.checksums import checksum
from esparse.packed.experts import PackedExperts
from esparse.packed.layer import PackedLinear
from esparse.patterns import Grouping
from esparse.pruning.method import Method
from esparse.pruning.prune import Pruned, prune
from esparse.quantise.grids import settings
from esparse.records.report import Stages
from esparse.recoveries import Chain, NoRecovery, Recovery
from esparse.recoveries.bias import Bias
from esparse.run.record import Size, memory, with_bytes
from esparse.shuffles import NoShuffle, Shuffle
from esparse.shuffles.gns import Gns
from tests.models.families import FAMILIES, MORE, tiny
from tests.models.test_store import opened, saved

CPU = torch.device("cpu")
TOKENS_SL = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(5))
GONE = "(deleted)"  # in place of an entry
GNS = Gns(deal="straight")
MIXTURES = ["mixtral", "qwen2-moe", "olmoe", "gpt-oss"]
RECORD: dict[str, Any] = {
    "id": "0123abcd",
    "model": {"name": "small", "pruned_parameters": 1000},
    "sparsity": {"pattern": "2:4", "density": 0.5},
    "quality": {"text": {"dense": 2.0, "pruned": 3.0, "tokens": 64, "sequence_length": 16}},
    "environment": {"esparse": "0"},
    "config": {
        "model": {"path": "small"},
        "choices": {"metric": "wanda", "shuffle": "gns"},
        "calibration": {"sequences": 4, "corpus": None, "seed": 0},
    },
}


def packed(**settings: Any) -> Packed:
    return Packed(**({"path": None, "dtype": "auto", "order": "physical"} | settings))


def dense(**settings: Any) -> Dense:
    return Dense(**({"path": None, "dtype": "auto", "order": "physical"} | settings))


def pruned(
    blocks: BlockModel,
    shuffle: Shuffle = GNS,
    recovery: Recovery | None = None,
    asked: tuple[str, str | None] = ("2:4", None),
) -> Pruned:
    method = Method(metric=Wanda(), pattern=patterns.parse(*asked), shuffle=shuffle, recovery=recovery or NoRecovery())
    return prune(blocks, TOKENS_SL, method, stages=Stages())


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS_SL, use_cache=False).logits


def written(export: Export, blocks: BlockModel, of: Pruned, folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    facts = export.write(Finished(blocks, tokenizer, of, TOKENS_SL, RECORD, folder))
    assert facts is not None
    return facts


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def exported(
    family: str, export: Export, folder: Path, **how: Any
) -> tuple[Tensor, PreTrainedModel, dict[str, Any], Pruned]:
    """The pruned model's logits, the export as it loads, its entry in the record, and what was pruned."""
    blocks = BlockModel(tiny(family), device=CPU, batch_tokens=24)
    of = pruned(blocks, **how)
    expected = logits(blocks.model)
    before = {name: value.clone() for name, value in blocks.model.state_dict().items()}
    facts = written(export, blocks, of, folder)
    assert all(torch.equal(value, before[name]) for name, value in blocks.model.state_dict().items())
    return expected, loaded(Path(facts["path"])), facts, of


@pytest.mark.parametrize("order", ["physical", "original"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gpt2", "bloom", "phi3", *MIXTURES])
def test_a_packed_model_computes_what_the_pruned_one_did(family: str, order: str, tmp_path: Path) -> None:
    expected, model, facts, of = exported(family, packed(order=order), tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    layers = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    entries = {m.entry.removesuffix(".weight") for m, _ in of.groupings if m.expert is None}
    assert layers == entries and facts["packed_layers"] == len(entries)
    experts = {name for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    assert experts == {m.entry for m, _ in of.groupings if m.expert is not None}
    assert facts["packed_experts"] == sum(m.expert is not None for m, _ in of.groupings)
    assert (facts["gathers"] > 0) == (order == "physical")
    assert facts["absorbed"] > 0 or order == "original" or family in MIXTURES


@pytest.mark.parametrize("asked", [("2:4", None), ("4:8", None), ("2:4", "4:16"), ("3:5", None)], ids=str)
def test_every_pattern_is_packed(asked: tuple[str, str | None], tmp_path: Path) -> None:
    expected, model, facts, _of = exported("llama", packed(), tmp_path, asked=asked)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, PackedLinear)
    # In the file's order the groups stand side by side.
    assert patterns.parse(*asked).holds(layer.packed().dense() != 0)
    files = [load_file(file) for file in sorted((tmp_path / "export").glob("*.safetensors"))]
    assert facts["bytes"] == sum(value.nbytes for file in files for value in file.values())


def test_generate_works_from_packed_weights(tmp_path: Path) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = blocks.model.generate(TOKENS_SL[:1], **asked)
    written(packed(), blocks, of, tmp_path)
    assert torch.equal(loaded(tmp_path / "export").generate(TOKENS_SL[:1], **asked), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_are_computed_one_by_one_however_one_loads(family: str, tmp_path: Path) -> None:
    expected, _, _, of = exported(family, packed(), tmp_path, shuffle=NoShuffle(), asked=("2:4", "4:16"))
    for asked in ({}, {"experts_implementation": "grouped_mm"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", **asked).eval()
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    name = next(matrix.entry for matrix, _ in of.groupings if matrix.expert is not None)
    assert model.get_submodule(name).packed(1).outlier_values_OS is not None


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_in_16_bits_packed_experts_are_what_dense_ones_are_one_by_one(family: str, tmp_path: Path) -> None:
    """Multiplied together (grouped_mm) they round otherwise, and a router on the border then takes other experts."""
    tiny(family).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    report = esparse.prune(model, None, "2:4", metric="wanda", calibration=TOKENS_SL, progress=False)
    esparse.save(model, None, report, tmp_path / "export", packed=True)
    packed_model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto").eval()
    model.eval().set_experts_implementation("eager")
    torch.testing.assert_close(logits(packed_model), logits(model), rtol=1e-2, atol=1e-2)


def test_experts_that_stay_dense_are_named_with_their_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, model, facts, of = exported("mixtral", packed(), tmp_path, asked=("2:4", "4:16"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    experts = [m for m, _ in of.groupings if m.expert is not None]
    assert facts["packed_experts"] == 0 and facts["dense_experts"] == len(experts)
    assert facts["dense_expert_bytes"] == sum(4 * m.view().numel() for m in experts)
    said = f"{len(experts)} experts stay dense, 0.2 MB with their zeros (model.layers.0.mlp.experts.gate_up_proj, ...)"
    assert said in caplog.text and "which a shuffle reorders" in caplog.text
    text = (tmp_path / "export" / "README.md").read_text()
    assert f"{len(experts)} experts are dense, {facts['dense_expert_bytes']:,} bytes" in text
    # The record says the same of each layer.
    assert {layer.name for layer in with_bytes(of) if layer.packed_bytes is None} == {m.name for m in experts}


@pytest.mark.parametrize("order", ["physical", "original"])
@pytest.mark.parametrize(
    ("family", "widths"), [("llama", (32, 32, 32, 48)), ("opt", (32, 32, 32, 48)), ("mixtral", None)]
)
def test_a_record_counts_the_orders_that_are_stored(
    family: str, widths: tuple[int, ...] | None, order: str, tmp_path: Path
) -> None:
    _, model, facts, of = exported(family, packed(order=order), tmp_path)
    files = [load_file(file) for file in sorted((tmp_path / "export").glob("*.safetensors"))]
    stored = {name: value for file in files for name, value in file.items()}
    orders = sum(value.nbytes for name, value in stored.items() if name.endswith("order"))
    layers = with_bytes(of)
    counted = memory(Size.of(tiny(family)), of, layers, 0, [])
    assert counted["file_bytes"] - counted["order_bytes"] + orders == facts["bytes"]
    if widths is not None:  # q, k, v; o; gate, up; down, in each block
        assert counted["order_bytes"] == len(model.get_decoder().layers) * 4 * sum(widths)
    if order == "physical":
        assert 0 < orders <= counted["order_bytes"]
    values = 32 * of.kept + of.metadata_bits
    assert counted["bits_per_weight"] == pytest.approx((values + 8 * counted["order_bytes"]) / of.weights)
    alone = sum(layer.packed_bytes or layer.dense_bytes for layer in layers)
    assert (
        counted["packed_bytes"]
        == counted["dense_bytes"] - sum(x.dense_bytes for x in layers) + alone + (counted["order_bytes"])
    )


def test_experts_in_several_patterns_stay_dense() -> None:
    expert = Matrix("experts", torch.nn.Parameter(torch.ones(3, 2, 4)), transposed=False, expert=0)
    of = [(expert, Grouping(patterns.parse(text))) for text in ("2:4", "2:4", "1:4")]
    assert why_dense(of[:2]) is None and "one packed pattern only" in str(why_dense(of))


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gpt2", "mixtral", "gpt-neox"])
@pytest.mark.parametrize("order", ["original", "physical"])
def test_a_dense_checkpoint_is_an_ordinary_one(family: str, order: str, tmp_path: Path) -> None:
    expected, model, _facts, of = exported(family, dense(order=order), tmp_path)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert zeros >= of.weights - of.kept
    assert not any((p.signbit() & (p == 0)).any() for p in model.parameters())
    if order == "physical" and family == "llama":  # what gate and up absorb stands in groups
        assert patterns.parse("2:4").holds(model.get_submodule("model.layers.1.mlp.down_proj").weight != 0)


def test_a_dense_checkpoint_says_in_how_many_layers_the_pattern_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, facts, of = exported("llama", dense(), tmp_path)  # which `check` would have refused
    assert 2 <= facts["holds_in"] < facts["of_layers"] == len(of.groupings)  # down_proj's, at least
    assert "weights keep their columns' own order" in caplog.text and "q_proj" in caplog.text
    caplog.clear()
    for shuffle in (NoShuffle(), Gns(deal="straight", foldable=True)):
        _, _, facts, of = exported("llama", dense(), tmp_path, shuffle=shuffle)
        assert facts["holds_in"] == facts["of_layers"] == len(of.groupings)
    _, _, facts, _ = exported("llama", dense(order="original"), tmp_path / "original")
    assert facts["holds_in"] == 0 and facts["path"].endswith("export-original-order")
    assert not caplog.text


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gpt2", "bloom", "phi3", "gpt-neox"])
def test_foldable_shuffles_leave_every_layer_in_groups(family: str, tmp_path: Path) -> None:
    expected, model, facts, of = exported(family, dense(), tmp_path, shuffle=Gns(deal="straight", foldable=True))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert facts["holds_in"] == facts["of_layers"] == len(of.groupings)
    assert facts["absorbed"] > 0 and len(of.orders) == facts["absorbed"]


@pytest.mark.parametrize("make", [packed, dense])
def test_a_model_read_block_by_block_gives_the_same_files(make: Any, tmp_path: Path) -> None:
    checkpoint = saved(tiny("llama"), tmp_path / "model", "shards")
    for store in ("memory", "shards"):
        blocks = opened(checkpoint, store)
        written(make(), blocks, pruned(blocks), tmp_path / store)
    for file in (tmp_path / "memory" / "export").iterdir():
        assert file.read_bytes() == (tmp_path / "shards" / "export" / file.name).read_bytes(), file.name


def test_what_a_block_reads_is_tried_on_what_the_blocks_before_it_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Tensor] = []

    def spied(block: Block, *args: Any, **how: Any) -> Reordered:
        read.append(torch.cat(block.activations.hidden))
        return reorder(block, *args, **how)

    monkeypatch.setattr(writer, "reorder", spied)
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    with torch.no_grad():
        states = blocks.model(input_ids=TOKENS_SL[:2], use_cache=False, output_hidden_states=True).hidden_states
    written(packed(), blocks, of, tmp_path)
    assert len(read) == len(blocks.blocks) > 1
    for got, expected in zip(read, states, strict=False):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("there", [True, False])
def test_without_numba_it_is_said_that_a_cpu_is_slow(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_layer, "loops", lambda dtype: pytest if there else None)
    exported("gpt2", packed(), tmp_path, shuffle=NoShuffle())
    assert ("install numba for compiled loops (pip install numba)" in caplog.text) == (not there)


def test_a_type_without_compiled_loops_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_layer, "loops", lambda dtype: pytest if dtype == torch.float32 else None)
    exported("gpt2", packed(), tmp_path, shuffle=NoShuffle())
    AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float64)
    said = "the compiled loops are for float32 and bfloat16, on most CPUs for float16, and not for float64"
    assert said in caplog.text and "install numba" not in caplog.text


def test_half_precision(tmp_path: Path) -> None:
    expected, model, facts, _ = exported("llama", packed(dtype="bfloat16"), tmp_path)
    assert model.dtype == torch.bfloat16 and facts["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    torch.testing.assert_close(logits(model).float(), expected, rtol=0.1, atol=0.1)


def test_biases_that_a_family_has_no_place_for(tmp_path: Path) -> None:
    recovery = Chain(first=NoRecovery(), second=Bias())
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    with pytest.raises(ValueError, match=r"q_proj, \.\.\.\), and an ordinary checkpoint .* has no place for them"):
        dense().ready(blocks, recovery, tmp_path)
    packed().ready(blocks, recovery, tmp_path)
    dense().ready(blocks, NoRecovery(), tmp_path)
    dense().ready(BlockModel(tiny("opt"), device=CPU, batch_tokens=24), recovery, tmp_path)
    expected, model, _, _ = exported("llama", packed(), tmp_path, recovery=recovery)
    assert model.get_submodule("model.layers.0.mlp.up_proj").bias is not None
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_parameter_that_transformers_does_not_build_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    """It would be dropped at loading with a warning; what is missing would get random numbers."""
    model = tiny("llama")
    blocks = BlockModel(model, device=CPU, batch_tokens=24)
    last = model.model.layers[-1]
    last.mlp.up_proj.bias = nn.Parameter(torch.zeros(len(last.mlp.up_proj.weight)))
    name = rf"layers\.{len(blocks.blocks) - 1}\.mlp\.up_proj\.bias"
    with pytest.raises(ValueError, match=rf"no place for model\.{name}: transformers builds LlamaForCausalLM without"):
        dense().ready(blocks, NoRecovery(), tmp_path)
    packed().ready(blocks, NoRecovery(), tmp_path)
    last.mlp.up_proj.bias = None
    last.extra = nn.Parameter(torch.zeros(1))
    for export in (dense(), packed()):
        with pytest.raises(ValueError, match=r"no place for model\.layers\.\d\.extra"):
            export.ready(blocks, NoRecovery(), tmp_path)
    del last.extra
    model.config.num_hidden_layers += 1
    for export in (dense(), packed()):
        with pytest.raises(ValueError, match=r"the model has no model\.layers\.\d\..* random numbers"):
            export.ready(blocks, NoRecovery(), tmp_path)


def test_tied_embeddings(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    blocks = BlockModel(model, device=CPU, batch_tokens=24)
    of = pruned(blocks)
    expected = logits(model)
    for export in (packed(), dense()):
        written(export, blocks, of, tmp_path)
        torch.testing.assert_close(logits(loaded(tmp_path / "export")), expected, rtol=1e-5, atol=1e-5)


def without_up_proj(layers: dict[str, str]) -> dict[str, str]:
    return {name: pattern for name, pattern in layers.items() if not name.endswith("up_proj")}


def as_older(folder: Path, **changes: Any) -> None:
    """Makes config.json that of a version without a digest, with changes, and with the files' checksums as they are."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    entry = config["quantization_config"]
    entry["files"] = {name: checksum(folder / name) for name in entry["files"]}
    del entry["digest"]
    entry |= {key: value(entry[key]) if callable(value) else value for key, value in changes.items()}
    config["quantization_config"] = {key: value for key, value in entry.items() if value != GONE}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("harm", ["cut", "flipped", "swapped"])
def test_a_damaged_file_is_refused_by_its_name(harm: str, tmp_path: Path) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    written(packed(), blocks, pruned(blocks), tmp_path)
    first, second = sorted((tmp_path / "export").glob("model-0000[23]-*.safetensors"))
    content = bytearray(second.read_bytes())
    if harm == "cut":
        second.write_bytes(content[:-100])
    elif harm == "flipped":
        content[-1] ^= 1
        second.write_bytes(content)
    else:
        shutil.copy(first, second)
    with pytest.raises(ValueError, match=f"{second.name} is damaged or cut short"):
        loaded(tmp_path / "export")


def test_an_index_that_no_writer_made_is_refused_with_its_layer(tmp_path: Path) -> None:
    """Whose checksum is right: of 2:4 an index has the numbers 0 to 5 in three bits."""
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    written(packed(), blocks, pruned(blocks), tmp_path)
    shard = sorted((tmp_path / "export").glob("*.safetensors"))[1]
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    name = next(name for name in tensors if name.endswith("up_proj.index"))
    tensors[name].fill_(255)
    save_file(tensors, shard, metadata)
    as_older(tmp_path / "export")
    layer = name.removesuffix(".index")
    with pytest.raises(ValueError, match=rf"the packed layer {layer} cannot be read: .*choices that are not 2 of 4"):
        loaded(tmp_path / "export")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layers", {"model.layers.0.nowhere": "2:4"}, "names the packed layer model.layers.0.nowhere, and LlamaForC"),
        ("layers", {"model.norm": "2:4"}, "names the packed layer model.norm, and LlamaForCausalLM has none"),
        ("layers", {"model.layers.0.mlp.up_proj": "two"}, "up_proj has the pattern 'two'"),
        ("layers", {"model.layers.0.mlp.up_proj": 124}, "up_proj has the pattern 124"),
        ("layers", {"model.layers.0.mlp.up_proj": "dense"}, "has the pattern 'dense', in which nothing is packed"),
        ("layers", {"model.layers.0.mlp.up_proj": "50%"}, "has the pattern '50%', in which nothing is packed"),
        ("layers", without_up_proj, "up_proj.index, of which its config.json says nothing"),
        ("behind", [], "of which its config.json says nothing"),
        ("before", [], "of which its config.json says nothing"),
        ("before", GONE, "of which its config.json says nothing"),
        ("biases", ["model.layers.0.mlp.up_proj"], "the checkpoint has no model.layers.0.mlp.up_proj.bias, which its"),
        ("ordered", ["model.layers.0.mlp.up_proj"], "the checkpoint has no model.layers.0.mlp.up_proj.order, which"),
        ("order", "sideways", "has the order 'sideways'"),
        ("grid", settings(option("quantise", "int4", group=16)), "the checkpoint has no model.layers.0"),
        ("layers", ["model.norm"], "layers in its quantization_config should be an object"),
        ("files", None, "files in its quantization_config should be an object, and is None"),
        ("before", ["model.norm"], "names the packed layer model.norm"),
        ("behind", "model.norm", "behind in its quantization_config should be a list"),
        ("behind", ["model.embed"], "names the norm model.embed"),
        ("experts", {"model.layers.0.experts": {}}, "names the owner of packed experts model.layers.0"),
        ("experts", {"model.layers.0.mlp.up_proj.weight": {}}, "names the"),
    ],
)
@pytest.mark.tries(4)
def test_a_configuration_that_was_edited_is_one_sentence(key: str, value: Any, words: str, tmp_path: Path) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    written(packed(), blocks, pruned(blocks), tmp_path)
    as_older(tmp_path / "export", **{key: value})
    with pytest.raises(ValueError, match=re.escape(words)):
        loaded(tmp_path / "export")


@pytest.mark.parametrize(
    ("order", "ending"), [("original", ".order"), ("physical", "output_order"), ("physical", "input_order")]
)
@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_an_order_in_a_checkpoint_that_is_none_is_damage(family: str, order: str, ending: str, tmp_path: Path) -> None:
    blocks = BlockModel(tiny(family), device=CPU, batch_tokens=24)
    written(packed(order=order), blocks, pruned(blocks), tmp_path)
    for shard in sorted((tmp_path / "export").glob("*.safetensors")):
        tensors = load_file(shard)
        if found := [name for name in tensors if name.endswith(ending)]:
            break
    assert found
    tensors[found[0]].fill_(10**6)
    save_file(tensors, shard, {"format": "pt"})
    as_older(tmp_path / "export")
    with pytest.raises(ValueError, match=r"cannot be read: the order of its \d+ channels does not name each"):
        loaded(tmp_path / "export")


def test_what_config_json_says_of_the_weights_has_a_checksum_too(tmp_path: Path) -> None:
    """Some changes leave a model that is loaded, and is another one; a copy of the configuration is the same one."""
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    written(packed(), blocks, pruned(blocks), tmp_path)
    folder = tmp_path / "export"
    model, file = loaded(folder), tmp_path / "export" / "config.json"
    right = json.loads(file.read_text())
    entry = right["quantization_config"]
    changes = [{key: {} if isinstance(entry[key], dict) else []} for key in ("readers", "behind", "before", "layers")]
    changes += [{"order": "original"}, {"version": 1}, {"digest": "0"}, {"files": entry["files"] | {"more": "0"}}]
    for change in changes:
        file.write_text(json.dumps(right | {"quantization_config": entry | change}))
        with pytest.raises(ValueError, match=r"config\.json is damaged or was edited"):
            loaded(folder)
    model.config.save_pretrained(folder)
    assert json.loads(file.read_text())["quantization_config"] == entry
    file.write_text(json.dumps(right | {"quantization_config": dict(sorted(entry.items(), reverse=True))}))
    torch.testing.assert_close(logits(loaded(folder)), logits(model))
    as_older(folder)
    torch.testing.assert_close(logits(loaded(folder)), logits(model))


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("up_proj.values", "the checkpoint has no model.layers.0.mlp.up_proj.values, which its config.json asks for"),
        ("up_proj.index", "the checkpoint has no model.layers.0.mlp.up_proj.index"),
        ("up_proj.salient_values", "the checkpoint has no model.layers.0.mlp.up_proj.salient_values"),
        ("up_proj.bias", "the checkpoint has no model.layers.0.mlp.up_proj.bias"),
        ("output_order", "output_order, which its config.json asks for"),
        ("file", "model-00004-of-00004.safetensors is missing, or its index does not name it"),
    ],
)
def test_tensors_that_are_missing_are_named(ending: str, words: str, tmp_path: Path) -> None:
    """transformers warns of them, and fills them with whatever stands in memory."""
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    written(packed(), blocks, pruned(blocks, asked=("2:4", "4:16"), recovery=Bias()), tmp_path)
    folder = tmp_path / "export"
    index = json.loads((folder / writer.INDEX).read_text())
    where = index["weight_map"]
    if ending == "file":
        last = sorted(folder.glob("*.safetensors"))[-1].name
        index["weight_map"] = {name: file for name, file in where.items() if file != last}
        (folder / writer.INDEX).write_text(json.dumps(index))
    else:
        name = next(name for name in sorted(where) if name.endswith(ending))
        tensors = load_file(folder / where[name])
        del tensors[name]
        save_file(tensors, folder / where[name], {"format": "pt"})
    as_older(folder)
    with pytest.raises(ValueError, match=re.escape(words)):
        loaded(folder)


@pytest.mark.tries(2)
@pytest.mark.parametrize(
    ("family", "ending"),
    [*product(("llama", "mixtral"), ("values", "salient_values", "salient_index")), ("llama", "bias")],
)
def test_values_that_no_run_writes_are_damage(family: str, ending: str, tmp_path: Path) -> None:
    """The place of the one outlier in 36 columns has six bits: 63 is none of them."""
    blocks = BlockModel(tiny(family), device=CPU, batch_tokens=24)
    of = pruned(blocks, NoShuffle(), asked=("2:4", "1:36"), recovery=Bias() if ending == "bias" else None)
    written(packed(), blocks, of, tmp_path)
    folder = tmp_path / "export"
    where = json.loads((folder / writer.INDEX).read_text())["weight_map"]
    name = next(name for name in sorted(where) if name.endswith(f"down_proj.{ending}"))
    tensors = load_file(folder / where[name])
    tensors[name].view(-1)[0] = 255 if ending.endswith("index") else torch.nan
    save_file(tensors, folder / where[name], {"format": "pt"})
    as_older(folder)
    layer = re.escape(name.removesuffix(f".{ending}"))
    what = (
        "the index is damaged: it has places" if ending.endswith("index") else f"a number of its {ending} is NaN or Inf"
    )
    with pytest.raises(ValueError, match=f"the packed layer {layer} cannot be read: {what}"):
        loaded(folder)


def test_only_a_run_packs_a_model(tmp_path: Path) -> None:
    """transformers neither writes a packed model again nor packs one that it loads."""
    _, model, _, _ = exported("llama", packed(), tmp_path)
    with pytest.raises(ValueError, match="cannot be saved again"):
        model.save_pretrained(tmp_path / "again")
    tiny("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="esparse does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=model.config.quantization_config)


def test_another_version_is_refused(tmp_path: Path) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    written(packed(), blocks, pruned(blocks), tmp_path)
    file = tmp_path / "export" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["version"] = 99
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 99"):
        loaded(tmp_path / "export")


def test_a_stopped_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    written(dense(), blocks, of, tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}
    from esparse.export import writer

    number = []

    def fail(tensors: Any, *args: Any, **kwargs: Any) -> None:
        number.append(1)
        if len(number) == 3:
            raise OSError("disk full")

    monkeypatch.setattr(writer, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        written(packed(), blocks, of, tmp_path)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_generation_settings_that_transformers_does_not_save_are_written(tmp_path: Path) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    blocks.model.generation_config.temperature = 0.7  # without do_sample
    with pytest.raises(ValueError, match="do_sample"):
        blocks.model.generation_config.save_pretrained(tmp_path / "other")
    written(dense(order="physical"), blocks, pruned(blocks), tmp_path)
    assert loaded(tmp_path / "export").generation_config.temperature == 0.7


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    """What transformers loads with them, what the mark names, and how many tensors come in order by themselves."""
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    blocks.model.generation_config.max_new_tokens = 7
    facts = written(dense(order="physical"), blocks, pruned(blocks), tmp_path)
    folder = tmp_path / "export"
    assert loaded(folder).generation_config.max_new_tokens == 7
    mark = json.loads((folder / writer.MARK).read_text())
    assert mark["files"] == {file.name: checksum(file) for file in folder.glob("*.safetensors")}
    assert len(mark["files"]) == 1 + len(blocks.blocks)
    assert facts["absorbed"] == len(blocks.blocks)  # down_proj's by gate and up


def test_a_folder_of_someone_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    place = packed(path=str(tmp_path / "mine"))
    place.ready(blocks, NoRecovery(), tmp_path)  # an empty one may be filled
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is there already, and is no export"):
        place.ready(blocks, NoRecovery(), tmp_path)


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    blocks = BlockModel(tiny("llama"), device=CPU, batch_tokens=24)
    facts = written(packed(), blocks, pruned(blocks), tmp_path)
    text = (tmp_path / "export" / "README.md").read_text()
    assert "# small, pruned to 2:4" in text and "| text | 64, 16 | 2.00 | 3.00 |" in text
    assert "import esparse" in text and f"{facts['bytes']:,} bytes" in text


@pytest.mark.every_family
@pytest.mark.parametrize("make", [packed, dense])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_is_loaded_as_it_was_pruned(family: str, make: Any, tmp_path: Path) -> None:
    """Window by window, as transformers alone computes it."""
    blocks = BlockModel(tiny(family), device=CPU, batch_tokens=24)
    of = pruned(blocks)
    assert of.weights > 0 and of.pattern_holds
    # What flows between blocks may be shared by them, so that each walk has its own.
    expected = window_losses(blocks, TOKENS_SL)
    facts = written(make(), blocks, of, tmp_path)
    model = loaded(tmp_path / "export")
    losses = [float(model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.detach()) for ids in TOKENS_SL]
    assert losses == pytest.approx(expected.tolist(), rel=1e-5)
    assert facts["not_loaded"] == 0


def original(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> BlockModel:
    """A model that was loaded from a folder in which other files lie, too."""
    tiny(family).to(dtype).save_pretrained(folder)
    for name in KEPT + LEFT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else "stand-in")
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    return BlockModel(model, device=CPU, batch_tokens=24)


KEPT = ["tokenizer.model", "merges.txt", "vocab.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"]
KEPT += [
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
]
KEPT += ["video_preprocessor_config.json", "qwen.tiktoken", "modeling_own.py", "additional_chat_templates/tools.jinja"]
LEFT = ["notes.txt", ".env", "training_args.bin", "trainer_state.json", "pytorch_model.bin.index.json", "optimizer.pt"]
LEFT += ["original/params.json", "README.md", "esparse.json", "model.gguf"]


@pytest.mark.parametrize("make", [packed, dense])
def test_files_beside_the_model_come_along(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocks = original(tmp_path / "original")
    with caplog.at_level(logging.INFO, "esparse"):
        written(make(), blocks, pruned(blocks), tmp_path)
    there = {str(file.relative_to(tmp_path / "export")) for file in (tmp_path / "export").rglob("*") if file.is_file()}
    assert set(KEPT) <= there
    assert not there & (set(LEFT) - {"README.md", "esparse.json"})
    assert (tmp_path / "export" / "README.md").read_text() != "stand-in"
    assert "not copied into the export: notes.txt" in caplog.text
    loaded(tmp_path / "export")


@pytest.mark.parametrize("make", [packed, dense])
def test_no_file_of_an_export_names_a_private_folder(make: Any, tmp_path: Path) -> None:
    blocks = original(tmp_path / "secret-project")
    record = RECORD | {"config": RECORD["config"] | {"model": {"path": str(tmp_path / "secret-project")}}}
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    make().write(Finished(blocks, tokenizer, pruned(blocks), TOKENS_SL, record, tmp_path))
    for file in (file for file in (tmp_path / "export").rglob("*") if file.is_file()):
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert "from `secret-project`, run" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("gpt2", "gpt2"),
        ("/data/me/x", "x"),
        ("~/models/x/", "x"),
        ("./x", "x"),
        ("a/b/c", "c"),
        ("builtin", "builtin"),
    ],
)
def test_the_card_names_what_others_can_find(path: str, said: str) -> None:
    assert card._public(path) == said


@pytest.mark.parametrize("make", [packed, dense])
def test_tensors_that_the_model_does_not_load_come_along(make: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    extra = {"model.layers.3.eh_proj.weight": torch.randn(32, 64).bfloat16(), "mtp.norm.weight": torch.ones(32)}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # which a model computes itself
    save_file(load_file(file) | extra | old, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original").eval()
    blocks = BlockModel(model, device=CPU, batch_tokens=24)
    of = pruned(blocks)
    expected = logits(blocks.model)
    facts = written(make(), blocks, of, tmp_path)
    assert facts["not_loaded"] == 2
    files = [load_file(file) for file in sorted((tmp_path / "export").glob("*.safetensors"))]
    there = {name: value for file in files for name, value in file.items()}
    for name, value in extra.items():
        assert torch.equal(there[name], value) and there[name].dtype == value.dtype
    assert not set(old) & set(there)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(there)
    torch.testing.assert_close(logits(loaded(tmp_path / "export")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("computed_in", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [packed, dense])
def test_what_a_family_keeps_in_float32_stays_so(make: Any, computed_in: torch.dtype, tmp_path: Path) -> None:
    tiny("deepseek-v3").to(torch.bfloat16).save_pretrained(tmp_path / "original")
    file, bias = tmp_path / "original" / "model.safetensors", "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = torch.tensor([8.00001, 8.00003, 7.9999, 8.0])
    save_file(load_file(file) | {bias: exact}, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", dtype=computed_in, experts_implementation="eager"
    ).eval()
    blocks = BlockModel(model, device=CPU, batch_tokens=24)
    written(make(dtype="bfloat16"), blocks, pruned(blocks), tmp_path)
    again = loaded(tmp_path / "export")
    assert again.dtype == torch.bfloat16 and torch.equal(again.get_buffer(bias), exact)
    usual = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    for name, value in (*usual.named_parameters(), *usual.named_buffers()):
        if name in again.state_dict():
            assert again.state_dict()[name].dtype == value.dtype, name


@pytest.mark.parametrize("prefix", ["", "someone/model--"])
@pytest.mark.parametrize("make", [packed, dense])
def test_code_of_the_models_own_comes_along(make: Any, prefix: str, tmp_path: Path) -> None:
    """A model from the hub names the repository of its code: here it lies in the export itself."""
    blocks = original(tmp_path / "original")
    (tmp_path / "original" / "modeling_own.py").write_text("from transformers import LlamaForCausalLM as Own\n")
    own, elsewhere = f"{prefix}modeling_own.Own", "other/repo--configuration_other.Other"
    blocks.model.config.auto_map = {"AutoModelForCausalLM": own, "AutoTokenizer": [own, None], "AutoConfig": elsewhere}
    written(make(), blocks, pruned(blocks), tmp_path)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    here = "modeling_own.Own"
    assert config["auto_map"] == {
        "AutoModelForCausalLM": here,
        "AutoTokenizer": [here, None],
        "AutoConfig": elsewhere,
    }
    assert "LlamaForCausalLM as Own" in (tmp_path / "export" / "modeling_own.py").read_text()
