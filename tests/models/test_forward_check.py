"""The walk over the blocks is the model: of hard families exactly, others are refused in a sentence."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from esparse.models import forward_check
from esparse.models.activations import Activations
from esparse.models.blocks import BlockModel
from esparse.models.calls import UnsupportedModel
from tests.models.families import SMALL, tiny

TOKENS_SL = torch.randint(1, 96, (5, 24), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")

PATH = Path(__file__).parents[2] / "experiments" / "families.py"
SPEC = importlib.util.spec_from_file_location("experiments_families", PATH)
assert SPEC is not None
assert SPEC.loader is not None
families = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = families
SPEC.loader.exec_module(families)

# One of each kind that is hard; `python experiments/families.py` tries all.
EXACT = {
    "bamba": "blocks return pairs",
    "openai-gpt": "blocks return lists",
    "glm_moe_dsa": "a block hands the indices that it chose to the next one",
    "gemma4_text": "later blocks read the keys of earlier ones from a dictionary",
    "gemma3n_text": "four streams that a router mixes",
    "mllama": "a block that is not run for text",
    "longcat_flash": "another number of blocks than of hidden layers in the configuration",
    "inkling2_text": "the model adds up what blocks returned, and hands the sum to later ones",
    "llama4_text": "all experts are multiplied at once",
    "dbrx": "experts in two dimensions",
    "zamba2": "two kinds of blocks, some with weights of an earlier one",
    "bart": "cross-attention that text does not use",
    "prophetnet": "a head that needs all hidden states at once",
}


def tried(family: str) -> dict[str, Any]:
    """What comes of a family that the installed transformers has: the oldest one that esparse takes lacks some."""
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} does not have {family}")
    return families.tried(family)


@pytest.mark.parametrize("family", EXACT)
def test_hard_families_walk_as_the_model_runs(family: str) -> None:
    found = tried(family)
    assert found["verdict"] == "exact", found
    assert found["pattern_holds"]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("dory", r"model\.layers\.1 runs 2 times in one forward pass"),
        ("inkling2_loop_text", r"model\.layers\.2 runs 3 times"),
        ("hrm_text", "no list of .* decoder blocks in HrmTextForCausalLM"),
        ("xlm", "sees the tokens behind the one it predicts"),
        ("xlnet", "sees the tokens behind the one it predicts"),
    ],
)
def test_what_cannot_be_walked_is_refused(family: str, why: str) -> None:
    found = tried(family)
    assert found["verdict"] == "refused"
    assert re.search(why, found["why"]), found["why"]


def walked(model: Any, tokens_SL: Tensor = TOKENS_SL, batch_tokens: int = 48) -> Tensor:
    blocks = BlockModel(model, device=CPU, batch_tokens=batch_tokens)
    stream = Activations(blocks, tokens_SL)
    for index in range(len(blocks.blocks)):
        stream.advance(index)
    return torch.cat([stream.logits(*part) for part in enumerate(blocks.micro_batches(tokens_SL))])


def wrap(model: Any, index: int, change: Any) -> None:
    block = model.model.layers[index]
    forward = block.forward
    block.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))


def test_one_block_at_two_places_is_refused_and_the_model_left_as_it_was() -> None:
    model = tiny("llama")
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(UnsupportedModel, match=r"some of model\.layers are one and the same block"):
        BlockModel(model, device=torch.device("cpu"), batch_tokens=64)
    model(torch.ones(1, 4, dtype=torch.long))


def test_an_encoder_is_refused() -> None:
    config = families.CORRECTIONS.get("bert", {}) | SMALL
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **config, is_decoder=False)).eval()
    with pytest.raises(UnsupportedModel, match="BertLMHeadModel sees the tokens behind the one it predicts"):
        walked(model)


def test_a_block_that_reads_what_another_left_in_the_model_is_refused() -> None:
    """With one micro-batch at a time all would look well."""
    model = tiny("llama")
    left: list[Tensor] = []

    def leave(out: Tensor) -> Tensor:
        left[:] = [out]
        return out

    wrap(model, 0, leave)
    wrap(model, 2, lambda out: out + left[0])
    with pytest.raises(UnsupportedModel, match="leave something in themselves or in the model that later blocks read"):
        walked(model)


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, float("-inf")])
def test_a_model_that_forbids_tokens_is_checked_as_any_other(value: float) -> None:
    """Beside such logits, every difference was taken for rounding, or nothing was compared."""

    def forbid(module: Any, args: Any, logits: Tensor) -> Tensor:
        return torch.cat([logits[..., :-4], torch.full_like(logits[..., -4:], value)], -1)

    def made() -> Any:
        model = tiny("llama")
        model.lm_head.register_forward_hook(forbid)
        return model

    assert torch.equal(walked(made()), made()(TOKENS_SL).logits)
    left: list[Tensor] = []
    model = made()
    wrap(model, 0, lambda out: left.insert(0, out) or out)
    wrap(model, 2, lambda out: out + left[0])
    with pytest.raises(UnsupportedModel, match="leave something in themselves or in the model"):
        walked(model)
    model = made()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + logits[:, -1:, :1])
    with pytest.raises(UnsupportedModel, match="sees the tokens behind the one it predicts"):
        walked(model)


def test_a_model_that_draws_at_random_is_refused() -> None:
    model = tiny("llama")
    wrap(model, 1, lambda out: out * torch.rand(()))
    with pytest.raises(UnsupportedModel, match="gives other logits each time"):
        walked(model)


class Secretive(LlamaForCausalLM):
    """Computes an argument of a block from what another returned, where nobody can follow it."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.model.embed_tokens(input_ids)
        cos, sin = self.model.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in self.model.layers:
            hidden = layer(hidden, position_embeddings=(cos * float(hidden.std()), sin))
        return SimpleNamespace(logits=self.lm_head(hidden))


def test_the_first_block_that_differs_is_named_and_what_it_is_given() -> None:
    model = tiny("llama")
    model.__class__ = Secretive
    named = r"the first block that differs is model\.layers\.1, which is given another position_embeddings"
    with pytest.raises(UnsupportedModel, match=named):
        walked(model)


class Between(LlamaForCausalLM):
    """Computes between its blocks, in place, too, and adds up what they return for its head."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.model.embed_tokens(input_ids)
        positions = self.model.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        seen = hidden.new_zeros(hidden.shape)
        for layer in self.model.layers:
            hidden = layer(self.model.norm(hidden).mul_(0.5), position_embeddings=positions)
            seen = seen + hidden
            hidden[:, :, 0] = 0.25
        return SimpleNamespace(logits=self.lm_head(hidden + seen))


def test_what_the_model_computes_between_blocks_is_carried_out() -> None:
    model = tiny("llama")
    model.__class__ = Between
    with torch.no_grad():
        expected = model(TOKENS_SL).logits
    torch.testing.assert_close(walked(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_model_that_is_walked_rightly_passes_in_any_precision(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    blocks = BlockModel(model, device=CPU, batch_tokens=48)
    forward_check.check(blocks, TOKENS_SL)
    assert blocks.checked


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = tiny("mixtral")
    model.set_experts_implementation("grouped_mm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    marks = {name: dict(vars(module)) for name, module in model.named_modules()}
    forward_check.check(BlockModel(model, device=CPU, batch_tokens=48), TOKENS_SL)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == marks
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.tries(1)
@pytest.mark.parametrize("family", ["gemma4_text", "glm_moe_dsa", "inkling2_text"])
def test_two_streams_have_their_own_state_and_it_can_be_saved(family: str) -> None:
    """Halved weights between the two streams: each ends as it would alone, also if it is saved on the way."""
    model = families.build(family)
    blocks = BlockModel(model, device=CPU, batch_tokens=48)
    alone = Activations(blocks, TOKENS_SL)
    for index in range(len(blocks.blocks)):
        alone.advance(index)
    pruned = Activations(blocks, TOKENS_SL)
    dense = pruned.twin()
    saved = None
    for index, block in enumerate(blocks.blocks):
        ahead = dense.advanced(index)
        before = {name: value.clone() for name, value in block.state_dict().items()}
        with torch.no_grad():
            for weight in block.parameters():
                weight.mul_(0.5)
        pruned.observe(index)
        pruned.advance(index)
        block.load_state_dict(before)
        dense.go_on(ahead)
        if index == 1:
            saved = dense.saved()
    assert all(torch.equal(h, expected) for h, expected in zip(dense.hidden, alone.hidden, strict=True))
    assert not torch.equal(pruned.hidden[0], alone.hidden[0])

    assert saved is not None
    resumed = Activations(blocks, TOKENS_SL)
    assert resumed.restore(saved)
    for index in range(2, len(blocks.blocks)):
        resumed.advance(index)
    assert all(torch.equal(h, expected) for h, expected in zip(resumed.hidden, alone.hidden, strict=True))
    assert not Activations(blocks, TOKENS_SL, 1).restore(saved), "of other micro-batches"
