"""What one does with a packed checkpoint once it is there: loading it without esparse, saving, sending, adapting it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from esparse.packed.format import WITHOUT_ESPARSE
from tests.export.test_export import exported, logits, packed
from tests.workshop import ROOT

TOKENS_SL = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(6))


LOADERS = ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel"]


def process(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", f"import sys, transformers\n{code}", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=kept | environment, cwd=folder)


@pytest.mark.slow
def test_without_esparse_nothing_is_loaded_and_one_sentence_says_why(tmp_path: Path) -> None:
    """transformers alone would skip the format with a warning, and fill the missing weights with random numbers."""
    exported("llama", packed(), tmp_path)
    tries = (
        f"for name in {LOADERS}:\n"
        "    for trust in (False, None):\n"
        "        try: getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=trust)\n"
        "        except ValueError as error: print(error)\n"
    )
    done = process(tries, tmp_path / "export")
    assert done.stdout.count(WITHOUT_ESPARSE) == 2 * len(LOADERS), done.stdout + done.stderr
    load = "transformers.LlamaForCausalLM.from_pretrained(sys.argv[1])"
    assert process(load, tmp_path / "export").returncode == 1
    after = process(f"import esparse\n{load}", tmp_path / "export", PYTHONPATH=str(ROOT))
    assert after.returncode == 0, after.stderr


def test_files_of_version_1_are_loaded_as_before(tmp_path: Path) -> None:
    expected, _, _, _ = exported("llama", packed(), tmp_path)
    place = tmp_path / "export" / "config.json"
    config = json.loads(place.read_text())
    assert config.pop("transformers_weights") == WITHOUT_ESPARSE
    config["quantization_config"]["version"] = 1
    del config["quantization_config"]["digest"]
    place.write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_a_packed_model_is_not_saved_again(tmp_path: Path) -> None:
    _, model, _, _ = exported("llama", packed(), tmp_path)
    with pytest.raises(ValueError, match="cannot be saved again: copy the folder"):
        model.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.glob("again/*.safetensors"))


class Answers(Dataset):  # type: ignore[type-arg]
    """The model is part of the data set, as for instance a model that scores samples would be."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(TOKENS_SL)

    @torch.no_grad()
    def __getitem__(self, index: int) -> torch.Tensor:
        answer: torch.Tensor = self.model(input_ids=TOKENS_SL[index : index + 1], use_cache=False).logits[0]
        return answer


def answers(model: PreTrainedModel) -> torch.Tensor:
    return torch.stack([Answers(model)[index] for index in range(len(TOKENS_SL))])


@pytest.mark.tries(1)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_packed_model_is_copied_pickled_and_sent_to_workers(family: str, how: str, tmp_path: Path) -> None:
    _, model, _, _ = exported(family, packed(), tmp_path)
    expected = answers(model)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    del model
    for other in (copied, pickled):
        assert torch.equal(answers(other), expected)
    loader = DataLoader(Answers(pickled), batch_size=None, num_workers=1, multiprocessing_context=how)
    torch.testing.assert_close(torch.stack(list(loader)), expected)


def test_a_packed_model_changes_its_precision_and_back(tmp_path: Path) -> None:
    expected, model, _, _ = exported("llama", packed(dtype="bfloat16"), tmp_path)
    half = logits(model)
    wide = logits(model.to(torch.float32))
    torch.testing.assert_close(wide, expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(logits(model.to(torch.bfloat16)), half, rtol=0.05, atol=0.05)


def test_adapters_of_peft_are_trained_beside_packed_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from esparse.packed.adapters import takes_packed

    _, model, _, _ = exported("llama", packed(), tmp_path)
    expected = logits(model)
    packed_before = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, takes_packed(config))
    torch.testing.assert_close(logits(adapted), expected)  # an adapter begins with nothing
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = adapted(input_ids=TOKENS_SL, labels=TOKENS_SL).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in adapted.base_model.model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in packed_before.items())
    with pytest.raises(ValueError, match="are not merged"):
        adapted.merge_and_unload()
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    asked = takes_packed(peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=asked).eval()
    torch.testing.assert_close(logits(again), logits(adapted.eval()))


@pytest.mark.parametrize("asked", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_adapters_that_read_dense_weights_are_refused(asked: dict[str, object]) -> None:
    peft = pytest.importorskip("peft")
    from esparse.packed.adapters import takes_packed

    with pytest.raises(ValueError, match="reads dense weights"):
        takes_packed(peft.LoraConfig(r=2, target_modules=["q_proj"], **asked))
