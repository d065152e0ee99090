"""A GGUF file is a model like any other: loaded, pruned, exported, resumed; what is wrong with one is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from esparse.cli import registry
from esparse.errors import Mistake
from esparse.models.load import BUILTIN, load, shape_only, weight_files
from esparse.models.source import files_beside, folder_of, not_loaded
from esparse.parts import extras
from esparse.records import audit
from tests import attempts
from tests.composing import composing
from tests.models.test_inputs import model_of
from tests.workshop import furnished, launch, small_run

gguf = pytest.importorskip("gguf", reason="the package gguf, of the extra of that name, is not installed")

BLOCKS = 3
# The names of a block's tensors in the file, by those of the model.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NAMES_OF_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def in_file(name: str) -> str:
    """What the file calls a weight of the model."""
    own = name.removesuffix(".weight")
    if own in NAMES_OF_ENDS:
        return f"{NAMES_OF_ENDS[own]}.weight"
    _, _, block, rest = own.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}.weight"


def rotated(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection in the file's order: the two of a rotated pair side by side."""
    rows = []
    size = len(weight_OI) // heads
    for head in range(heads):
        for pair in range(size // 2):
            rows += [weight_OI[head * size + pair], weight_OI[head * size + size // 2 + pair]]
    return torch.stack(rows)


def vocabulary(writer: Any) -> None:
    tokenizer = json.loads((BUILTIN / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token == tokens[0] else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def written(model: LlamaForCausalLM, file: Path, kind: str = "Q8_0", **strange: Any) -> Path:
    """The model as a GGUF file: matrices of the blocks in this type, everything else in 32 bits."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for key, value in strange.items():
        writer.add_uint16(key.replace("_", "."), value)
    vocabulary(writer)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = rotated(weight, config.num_attention_heads)
        values = weight.float().numpy()
        if "_proj" not in name or kind == "F32":
            writer.add_tensor(in_file(name), values)
        elif kind == "Q8_K":  # which gguf does not take apart: blocks of 256 values with no sense
            writer.add_tensor(in_file(name), np.zeros((1, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
        else:
            of_kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(in_file(name), gguf.quants.quantize(values, of_kind), raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA as directory (`model`) and as GGUF files, a text, and a file that is somebody else's."""
    folder = furnished(tmp_path_factory.mktemp("gguf"), blocks=BLOCKS)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    written(model, folder / "plain.gguf", "F32")
    written(model, folder / "small.gguf", "Q8_0")
    (folder / "tokens.json").write_text("{}")
    return folder


def run_of(place: Path, file: str, output_root: Path, *more: str) -> list[str]:
    return [*small_run(place, output_root), f"model.path={place / file}", *more]


def test_a_file_of_32_bits_is_the_model_that_it_was_made_of(place: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load(model_of(place / "plain.gguf"), tmp_path)
    original = LlamaForCausalLM.from_pretrained(place / "model")
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    text = "The quick brown fox"
    own = AutoTokenizer.from_pretrained(place / "model")
    assert tokenizer(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids


def test_blocks_of_integers_become_their_values_and_nothing_says_that_they_were(place: Path, tmp_path: Path) -> None:
    model, _, _ = load(model_of(place / "small.gguf"), tmp_path)
    original = LlamaForCausalLM.from_pretrained(place / "model").state_dict()["model.layers.1.mlp.up_proj.weight"]
    up_OI = model.model.layers[1].mlp.up_proj.weight
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear and up_OI.dtype == torch.float32
    # By hand: a block of 32 is its largest absolute value / 127, stored in 16 bits, times integers.
    block_B = original[0, :32]
    step = (block_B.abs().max() / 127).half().float()
    torch.testing.assert_close(up_OI[0, :32], (block_B / (block_B.abs().max() / 127)).round() * step)
    assert getattr(model, "hf_quantizer", None) is None
    assert "quantization_config" not in model.config.to_dict()


def test_what_lies_beside_a_file_is_none_of_its_files(place: Path, tmp_path: Path) -> None:
    model, _, _ = load(model_of(place / "plain.gguf"), tmp_path)
    assert folder_of(model) is None and not_loaded(model) == (None, [])
    assert place / "tokens.json" in files_beside(place)  # as it would be beside a directory's weights


@pytest.mark.slow
def test_a_run_leaves_an_ordinary_checkpoint_that_measures_the_same(place: Path, tmp_path: Path) -> None:
    done = launch(*run_of(place, "small.gguf", tmp_path / "out", "export=dense", "model.dtype=float32", "shuffle=none"))
    assert done.returncode == 0, done.stderr
    assert "de-quantizing" not in done.stderr
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/result.json"))
    exported = Path(record["export"]["path"])
    assert list(record["sources"]["model.path"]) == ["small.gguf"]
    assert record["sparsity"]["pattern_holds"] and record["sparsity"]["density"] == 0.5
    config = json.loads((exported / "config.json").read_text())
    assert "quantization_config" not in config and not (exported / "tokens.json").exists()
    for file in exported.glob("*.json"):
        assert str(place) not in file.read_text(), f"{file.name} names a folder of this machine"
    again = AutoModelForCausalLM.from_pretrained(exported)
    assert float((again.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5
    measured = launch(*run_of(place, str(exported), tmp_path / "again", "metric=magnitude", "shuffle=none"))
    assert measured.returncode == 0, measured.stderr
    (second,) = (json.loads(file.read_text()) for file in (tmp_path / "again").glob("*/result.json"))
    assert second["quality"]["text.txt"]["dense"] == pytest.approx(record["quality"]["text.txt"]["pruned"], rel=1e-6)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_with_the_same_masks(place: Path, tmp_path: Path) -> None:
    whole, stopped = (run_of(place, "small.gguf", tmp_path / name) for name in ("whole", "stopped"))
    process = attempts.start(whole)
    process.join()
    assert process.exitcode == 0
    process = attempts.start(stopped)
    assert attempts.killed_when(process, lambda: any((tmp_path / "stopped").glob("*/blocks/*00001*")))
    done = launch(*stopped)
    assert done.returncode == 0, done.stderr
    (first,), (second,) = ((tmp_path / name).glob("*/result.json") for name in ("whole", "stopped"))
    kept, again = audit.read_masks(first.parent), audit.read_masks(second.parent)
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)


def test_its_shape_is_known_without_its_weights(place: Path) -> None:
    skeleton = shape_only(model_of(place / "small.gguf"))
    original = LlamaForCausalLM.from_pretrained(place / "model")
    assert sum(p.numel() for p in skeleton.parameters()) == sum(p.numel() for p in original.parameters())
    (stamp,) = weight_files(model_of(place / "small.gguf"))
    assert stamp.startswith("small.gguf ")


@pytest.mark.slow
def test_what_is_wrong_with_a_file_is_one_sentence(place: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(place / "model")
    written(model, tmp_path / "strange.gguf", "Q8_K")
    written(model, tmp_path / "part.gguf", "F32", split_count=2)
    (tmp_path / "cut.gguf").write_bytes((place / "small.gguf").read_bytes()[:-2000])
    (tmp_path / "text.gguf").write_text("no such thing")
    expected = {
        "strange": "holds tensors of type Q8_K (blk.0.attn_q.weight, ...), which cannot be dequantised",
        "part": "is one of 2 parts of a model",
        "cut": "cannot be read as a GGUF file",
        "text": "cannot be read as a GGUF file",
        "none": "there is no file",
    }
    for name, words in expected.items():
        done = launch(*run_of(place, "model", tmp_path / "out", f"model.path={tmp_path / name}.gguf"))
        assert done.returncode in (1, 2) and words in done.stderr, done.stderr
        assert sum(line.startswith("esparse: ") for line in done.stderr.splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stderr, done.stderr


def test_blocks_are_not_read_one_by_one() -> None:
    with pytest.raises(Mistake, match=r"some\.gguf is a GGUF file, which is loaded whole: use model\.store=memory"):
        model_of(Path("some.gguf"), store="shards")


def test_a_missing_package_is_one_sentence_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with composing():
        config = compose("config", run_of(tmp_path, "x.gguf", tmp_path / "out"))
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(Mistake, match=r"x\.gguf needs gguf, which is not installed: pip install 'esparse\[gguf\]'"):
        registry.build(config)
