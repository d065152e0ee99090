"""esparse.prune on models in memory: the masks of a run, a model left as it was, and refusals of one sentence."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import esparse
from esparse.metrics import Metric
from esparse.metrics.wanda import Wanda
from esparse.parts import numbers
from esparse.records import audit
from tests.models.families import FAMILIES, tiny
from tests.same import same_but_for_ties
from tests.workshop import ROOT, furnished, launch, small_run

# By its name in later versions of transformers, and in earlier ones.
CHECKPOINTING = getattr(
    PreTrainedModel, "activation_checkpointing_enable", getattr(PreTrainedModel, "gradient_checkpointing_enable", None)
)
TOKENS_SL = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(3))


@dataclass(kw_only=True, slots=True)
class Squares(Metric):
    """A metric of a user's own; it fails at the layer of this name."""

    fails_at: str = "nowhere"

    def score(self, weight_OI: torch.Tensor, stats: Any) -> torch.Tensor:
        if self.fails_at in stats.name:
            raise RuntimeError("made for a test")
        return weight_OI.square()


def pruned(model: PreTrainedModel, **how: Any) -> esparse.Report:
    return esparse.prune(model, None, "2:4", calibration=TOKENS_SL, **how)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnished(tmp_path_factory.mktemp("workshop"), blocks=2)


@pytest.fixture
def loaded(workshop: Path) -> tuple[PreTrainedModel, Any]:
    folder = workshop / "model"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)


def test_tokens_that_say_nothing_are_a_warning(
    loaded: tuple[PreTrainedModel, Any], caplog: pytest.LogCaptureFixture
) -> None:
    esparse.prune(loaded[0], None, calibration=torch.full((16, 16), 7), progress=False)
    (said,) = caplog.messages
    assert said.startswith("the calibration has 1 different tokens among 256: it says next to nothing")


IDLE = {"update": {"obs", "support"}, "recovery": {"variance"}}  # by whole rows
BUSY = {"update": ["sparsegpt", "alps_parent"], "recovery": ["bias"]}


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in IDLE for name in [*sorted(IDLE[group]), *BUSY[group]]]
)
def test_what_changes_nothing_with_whole_rows_is_said(
    group: str, name: str, loaded: tuple[PreTrainedModel, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def weights(**how: Any) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(loaded[0])
        esparse.prune(
            model, None, "50%@rows", calibration=TOKENS_SL, metric="wanda", progress=False, **({"shuffle": None} | how)
        )
        return model.state_dict()

    plain, changed = weights(), weights(**{group: name})
    same = plain.keys() == changed.keys() and all(torch.equal(plain[key], changed[key]) for key in plain)
    said = f"{group}={name} does nothing with the pattern 50%@rows, whose kept rows keep all of their weights"
    assert same == (name in IDLE[group]) == (said in caplog.messages)


def test_a_shuffle_that_was_asked_for_and_changes_nothing_is_said(
    loaded: tuple[PreTrainedModel, Any], caplog: pytest.LogCaptureFixture
) -> None:
    esparse.prune(loaded[0], None, "50%", calibration=TOKENS_SL, progress=False)  # its shuffle is the metric's
    assert not caplog.messages
    esparse.prune(copy.deepcopy(loaded[0]), None, "60%", calibration=TOKENS_SL, shuffle="gns", progress=False)
    assert "shuffle=gns does nothing with the pattern 60%, which has no groups of n:m" in caplog.messages


def test_importing_esparse_is_quick_and_loads_no_torch() -> None:
    code = "import time; t = time.process_time(); import esparse, sys; print(time.process_time() - t); "
    code += "assert not {'torch', 'transformers', 'hydra', 'yaml'} & set(sys.modules); esparse.__dir__()"
    times = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.1
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        esparse.prunes  # noqa: B018
    assert set(esparse.__all__) <= set(dir(esparse))


@pytest.mark.tries(1)
@pytest.mark.parametrize(
    ("overrides", "how"),
    [
        pytest.param([], {}, marks=pytest.mark.slow),
        pytest.param(
            ["metric=wanda", "update=alps", "pattern=8:16"],
            {"metric": "wanda", "update": "alps", "pattern": "8:16"},
            marks=pytest.mark.slow,
        ),
        pytest.param(["metric=sparsegpt"], {"metric": "sparsegpt"}, marks=pytest.mark.slow),
        (["metric=random", "seed=4"], {"metric": "random", "seed": 4}),
    ],
    ids=str,
)
def test_the_masks_and_numbers_are_those_of_a_run(
    overrides: list[str], how: dict[str, Any], loaded: Any, workshop: Path, tmp_path: Path
) -> None:
    done = launch(*small_run(workshop, tmp_path / "out"), *overrides)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in tmp_path.glob("out/*/result.json"))
    record = json.loads((folder / "result.json").read_text())
    report = esparse.prune(*loaded, calibration=workshop / "text.txt", sequences=4, length=16, **how)
    masks = audit.read_masks(folder)
    made = json.loads(json.dumps(report.to_dict()))
    assert set(made) <= set(record)
    for key in ("sparsity", "recovery"):
        assert made[key] == record[key]
    # The damping of the conf/ of each update; without one, masks depend on sums of integers and on squares alone.
    damp = 0.01 if {"metric=sparsegpt", "update=alps"} & set(overrides) else None
    tied = same_but_for_ties((report.keeps, masks), (made["layers"], record["layers"]), damp=damp, share=0.95)
    assert damp is not None or not tied
    for group in ("metric", "shuffle", "update", "recovery", "prepare", "allocation"):
        assert made["config"][group] == record["config"][group]
        assert made["config"]["choices"][group] == record["config"]["choices"][group]


@pytest.mark.slow
def test_distillation_reads_the_same_further_sequences_as_in_a_run(workshop: Path, tmp_path: Path) -> None:
    small = [*small_run(workshop, tmp_path / "out"), "metric=magnitude", "shuffle=none"]
    done = launch(*small, "recovery=distill", "recovery.epochs=2")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out/*/result.json")
    record = json.loads(path.read_text())
    assert record["calibration"]["further_sequences"] == 8  # of the second pass, and to measure the loss on

    def trained(fresh: bool) -> tuple[float, float, int]:
        folder = workshop / "model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        how: dict[str, Any] = {"calibration": workshop / "text.txt", "sequences": 4, "length": 16}
        recovery = esparse.option("recovery", "distill", epochs=2, fresh=fresh)
        report = esparse.prune(model, tokenizer, metric="magnitude", shuffle=None, recovery=recovery, **how)
        (part,) = report.to_dict()["recovery"]
        return part["before"], part["after"], part["steps"]

    (part,) = record["recovery"]
    assert trained(True) == pytest.approx((part["before"], part["after"], part["steps"]), rel=1e-4)
    assert trained(False)[1] != pytest.approx(part["after"], rel=1e-3)


def test_the_defaults_are_those_of_the_command_line() -> None:
    usual = numbers.usual()
    defaults = {k: p.default for k, p in inspect.signature(esparse.prune).parameters.items()}
    for name in ("metric", "recovery", "prepare", "allocation", "pattern", "outliers", "seed", "calibration"):
        assert defaults[name] == usual[name], name
    for follows in ("shuffle", "update"):  # the metric, there by the files of conf/, here by a word
        assert (defaults[follows], usual[follows]) == ("implied", "none")


def test_the_shuffle_and_the_update_follow_the_metric_also_where_it_is_an_object() -> None:
    def chosen(metric: Any, **other: Any) -> tuple[str, str]:
        report = pruned(tiny("llama"), metric=metric, **other)
        return report.config["choices"]["shuffle"], report.config["choices"]["update"]

    assert chosen(esparse.option("metric", "entropy", gamma=0.25)) == ("esparse", "none")
    assert chosen(esparse.option("metric", "sparsegpt", damp=0.1)) == ("none", "sparsegpt")
    assert chosen(esparse.option("metric", "wanda")) == chosen("wanda") == ("none", "none")
    assert chosen("entropy", shuffle=None) == ("none", "none")


def test_a_report_has_all_and_prints_as_a_table() -> None:
    model = tiny("llama")
    report = pruned(model, metric="wanda", shuffle="gns")
    assert report.density == 0.5
    assert report.pattern_holds
    for name, keep_OI in report.keeps.items():
        assert torch.equal(model.get_parameter(name) != 0, keep_OI)
    assert sorted(report.orders) == sorted(report.keeps)
    lines = str(report).splitlines()
    assert len(lines) == len(report.layers) + 3
    assert lines[0].split() == ["layer", "shape", "kept", "weights", "kept", "score", "error", "seconds"]
    assert "model.layers.2.mlp.down_proj" in lines[-2]
    weights = sum(keep.numel() for keep in report.keeps.values())
    assert lines[-1].startswith(f"2:4 wanda gns: 50.00% of {weights:,} weights in 21 layers survive, the pattern ho")
    assert report.name in repr(report)


def as_it_is(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "forward": [module.__dict__.get("forward") for module in model.modules()],
        "hooks": [
            {kind: dict(own) for kind, own in vars(module).items() if "hook" in kind and isinstance(own, dict)}
            for module in model.modules()
        ],
        "experts": model.get_experts_implementation(),
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "config": model.config.to_dict(),
    }


@pytest.mark.parametrize("fails_at", ["nowhere", "layers.1.mlp"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom"])
def test_a_model_is_left_as_it_was(family: str, fails_at: str) -> None:
    """In training, with a frozen part, checkpointing, hooks and wrapped forwards, and experts by grouped_mm."""
    model, plain = tiny(family), tiny(family)
    if family == "mixtral":
        model.set_experts_implementation("grouped_mm")
    model.train()
    CHECKPOINTING(model)
    model.get_input_embeddings().requires_grad_(False)
    model.base_model.get_submodule("h" if family == "bloom" else "layers")[1].eval()
    seen: list[int] = []
    block = model.base_model.get_submodule("h" if family == "bloom" else "layers")[0]
    block.register_forward_hook(lambda *_: seen.append(1))
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before, environment, handlers = as_it_is(model), dict(os.environ), list(logging.getLogger("esparse").handlers)
    if fails_at == "nowhere":
        report = pruned(model, metric=Squares())
        other = pruned(plain, metric=Squares())
        assert all(torch.equal(report.keeps[name], keep) for name, keep in other.keeps.items())
        assert set(report.keeps) == set(other.keeps)
        assert seen
    else:
        with pytest.raises(RuntimeError, match="made for a test"):
            pruned(model, metric=Squares(fails_at="h.1." if family == "bloom" else fails_at.partition(".mlp")[0]))
    assert as_it_is(model) == before
    assert (dict(os.environ), logging.getLogger("esparse").handlers) == (environment, handlers)
    esparse.perplexity(model, None, TOKENS_SL)
    assert as_it_is(model) == before


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_are_pruned_however_they_are_computed(family: str) -> None:
    model_type, settings = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    assert set(model.get_experts_implementation().values()) != {"eager"}
    report = pruned(model)
    stacks = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    assert stacks
    for name in stacks:
        assert report.keeps[name].float().mean() == 0.5
    assert (torch.cat([model.get_parameter(name).flatten() for name in stacks]) == 0).float().mean() == 0.5


def test_parts_of_ones_own_and_none() -> None:
    model, other = tiny("llama"), tiny("llama")
    report = pruned(model, metric=esparse.option("metric", "entropy", gamma=0.25), shuffle=None, update=None)
    assert report.config["metric"]["gamma"] == 0.25
    assert report.config["choices"]["metric"] == "Entropy"
    assert not report.orders
    assert pruned(other, metric=Wanda(), recovery=None, prepare=None, allocation=None).config["metric"] == {
        "_class": "Wanda"
    }
    own = pruned(tiny("llama"), metric=Squares())
    assert own.config["metric"] == {"_class": f"{__name__}:Squares", "fails_at": "nowhere"}


def test_texts_and_files_and_tokens_calibrate(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    texts = ["The quick brown fox jumps over the lazy dog. " * 40, "A second text. " * 100]
    report = esparse.prune(model, tokenizer, calibration=texts, sequences=3, length=16)
    assert report.tokens_SL.shape == (3, 16)
    assert report.config["calibration"] == {"corpus": "texts", "sequences": 3, "length": 16, "seed": 0}
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": texts[0]}) + "\n")
    part = esparse.option("calibration", "text", path=str(tmp_path / "a.jsonl"), column="body", sequences=2, length=8)
    assert esparse.prune(model, tokenizer, calibration=part).tokens_SL.shape == (2, 8)
    again = esparse.prune(model, None, calibration=report.tokens_SL.int())
    assert torch.equal(again.tokens_SL, report.tokens_SL)


def test_half_a_surrogate_pair_is_no_text(loaded: Any) -> None:
    with pytest.raises(ValueError, match="text 1 holds half of a surrogate pair"):
        esparse.prune(*loaded, "2:4", calibration=["fine", "\ud800 not"], sequences=1, length=8)


def test_perplexity_is_that_of_a_run(loaded: Any, workshop: Path, tmp_path: Path) -> None:
    assert launch(*small_run(workshop, tmp_path / "out")).returncode == 0
    (path,) = tmp_path.glob("out/*/result.json")
    quality = json.loads(path.read_text())["quality"]["text.txt"]
    text = workshop / "held" / "text.txt"
    measured = esparse.perplexity(*loaded, text, length=32, max_tokens=128)
    assert measured == pytest.approx(quality["dense"], rel=1e-5)
    esparse.prune(*loaded, calibration=str(workshop / "text.txt"), sequences=4, length=16)
    measured = esparse.perplexity(*loaded, [text.read_text()], length=32, max_tokens=128)
    assert measured == pytest.approx(quality["pruned"], rel=1e-5)


def test_a_text_that_was_calibrated_on_is_told(loaded: Any, workshop: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = loaded
    text, held = workshop / "text.txt", workshop / "held" / "text.txt"
    texts = [f"{number} is a number, and {number * number} is its square. " for number in range(400)]

    def said(about: PreTrainedModel, text: Any, **how: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "esparse"):
            esparse.perplexity(about, tokenizer, text, **how)
        return caplog.text

    assert not said(model, text, length=32)
    esparse.prune(model, tokenizer, calibration=text, sequences=4, length=32)
    report = esparse.prune(model, tokenizer, calibration=texts, sequences=4, length=48)
    assert f"100 % of the calibration is in the evaluation text {text}, and" in said(model, text, length=64)
    assert "in the evaluation text given as texts" in said(model, texts, length=64)
    assert "in the evaluation text given as tokens" in said(model, report.tokens_SL)
    assert f"evaluation text {text}" in said(copy.deepcopy(model), text, length=64)
    assert not said(model, held, length=64)
    other = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype="auto")
    assert not said(other, text, length=64)
    with torch.inference_mode():
        assert "given as texts" in said(model, texts, length=64)


@pytest.mark.slow
def test_a_caller_may_be_in_inference_mode() -> None:
    model, usual = tiny("llama"), tiny("llama")
    with torch.inference_mode():
        report = pruned(model, metric="wanda", update="alps")
        measured = esparse.perplexity(model, None, TOKENS_SL.clone())
    again = pruned(usual, metric="wanda", update="alps")
    assert all(torch.equal(keep_OI, again.keeps[name]) for name, keep_OI in report.keeps.items())
    assert measured == esparse.perplexity(usual, None, TOKENS_SL)
    with torch.inference_mode():
        esparse.pack(model, report)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


@pytest.mark.slow
def test_a_model_that_compiles_itself_is_pruned_as_it_is_and_compiles_again() -> None:
    plain, compiling = tiny("llama"), tiny("llama")
    calls: list[int] = []
    compiling.compile(backend=lambda graph, inputs: calls.append(1) or graph)
    pruned(plain), pruned(compiling)
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), compiling.parameters(), strict=True))
    assert compiling._compiled_call_impl is not None


@pytest.mark.parametrize("how", [{}, {"metric": "gradient", "shuffle": None}, {"recovery": "window"}], ids=str)
def test_a_caller_may_have_gradients_and_autocast(how: dict[str, Any]) -> None:
    model, plain = tiny("llama"), tiny("llama")
    expected = esparse.perplexity(plain, None, TOKENS_SL)
    pruned(plain, **how)
    model(input_ids=TOKENS_SL, labels=TOKENS_SL).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert esparse.perplexity(model, None, TOKENS_SL) == expected
        pruned(model, **how)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients and left.keys() == gradients.keys()
    assert all(torch.equal(left[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"metric": "entropy", "shuffle": "esparse", "update": "admm"},
        {"metric": "random", "prepare": "equalise", "recovery": "bias"},
    ],
    ids=str,
)
def test_pytorchs_default_dtype_changes_nothing(how: dict[str, Any], default: torch.dtype) -> None:
    plain, other = tiny("llama"), tiny("llama")
    pruned(plain, **{"update": "obs"} | how)
    torch.set_default_dtype(default)
    try:
        pruned(other, **{"update": "obs"} | how)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_two_threads_prune_two_models() -> None:
    families = ["llama", "mixtral", "gpt2", "qwen3"]
    expected = {family: pruned(tiny(family)) for family in families}
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            models = [tiny(family) for family in families]
            for family, report in zip(families, pool.map(pruned, models), strict=True):
                assert set(report.keeps) == set(expected[family].keeps)
                for name, keep in expected[family].keeps.items():
                    assert torch.equal(report.keeps[name], keep), name
    assert torch.get_num_threads() == threads


def test_progress_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    pruned(tiny("llama"))  # pytest's output is no terminal
    pruned(tiny("llama"), progress=False)
    assert capsys.readouterr() == ("", "")
    pruned(tiny("llama"), progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert "pruning" in said.err and "0/3" in said.err  # later ones are shown every tenth of a second only


def test_a_model_with_accelerates_hooks_is_pruned_as_any_other() -> None:
    from accelerate import dispatch_model

    model = tiny("llama")
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert model.hf_device_map == {"": "cpu"}
    before = as_it_is(model)
    report, expected = pruned(model), pruned(tiny("llama"))
    assert all(torch.equal(report.keeps[name], keep) for name, keep in expected.keeps.items())
    assert as_it_is(model) == before


def offloaded(folder: Path) -> PreTrainedModel:
    from accelerate import disk_offload

    model = tiny("llama")
    disk_offload(model, str(folder))
    return model


def spread() -> PreTrainedModel:
    model = tiny("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    return model


def in_8_bits() -> PreTrainedModel:
    model = tiny("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def parametrised() -> PreTrainedModel:
    model = tiny("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def masked_by_torch() -> PreTrainedModel:
    from torch.nn.utils import prune

    model = tiny("llama")
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.3)
    return model


def compiled_inside() -> PreTrainedModel:
    model = tiny("llama")
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def inferring() -> PreTrainedModel:
    with torch.inference_mode():
        return tiny("llama")


def rescaled() -> PreTrainedModel:
    """RWKV divides the weights of later blocks in its first forward pass, and not again."""
    sizes = {"vocab_size": 96, "hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32}
    config = AutoConfig.for_model("rwkv", **sizes, num_hidden_layers=4, rescale_every=2, context_length=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(TOKENS_SL)
    return model


def encoder_decoder() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: torch.nn.Linear(4, 4), "a causal language model of transformers was expected, got a Linear"),
        (lambda folder: torch.compile(tiny("llama")), "model._orig_mod"),
        (lambda folder: encoder_decoder(), "esparse prunes decoder-only models"),
        (offloaded, "weights of the model are not in memory"),
        (lambda folder: spread(), "spread over several devices"),
        (lambda folder: in_8_bits(), "model.layers.0.mlp.up_proj.weight is in float8_e4m3fn"),
        (lambda folder: parametrised(), "parametrize"),
        (
            lambda folder: torch.nn.DataParallel(tiny("llama")),
            "got a DataParallel: give the model inside, model.module",
        ),
        (lambda folder: compiled_inside(), r"model.layers.0 was compiled.*model.layers.0._orig_mod"),
        (lambda folder: masked_by_torch(), r"model.layers.0.mlp.up_proj computes its weight from others"),
        (lambda folder: inferring(), r"was made under torch.inference_mode\(\)"),
        (lambda folder: rescaled(), "RwkvForCausalLM rewrites its weights when it runs.*set rescale_every to 0"),
        (lambda folder: LlamaForCausalLM.from_pretrained.__self__, "expected, got a type"),
    ],
)
@pytest.mark.tries(6)
def test_what_cannot_be_pruned_is_refused_in_a_sentence(
    make: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        pruned(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"metric": "wandaa"}, "no metric 'wandaa': did you mean wanda"),
        ({"metric": None}, "metric must be the name"),
        ({"metric": Wanda}, "metric must be the name of an option or an object of esparse.metrics.Metric"),
        ({"shuffle": Wanda()}, "shuffle must be the name"),
        ({"pattern": "4:2"}, "pattern"),
        ({"metric": "gradient", "prepare": "equalise"}, "use metric.source=block or prepare=none"),
        ({"allocation": "owl"}, "cannot change 2:4"),
        ({"outliers": "16:250"}, "not a multiple of 4"),
        ({"seed": -1}, "seed must be between"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"calibration": "builtin"}, "give one, or tokens"),
        ({"calibration": "bultin"}, "did you mean builtin"),
        ({"calibration": TOKENS_SL[0]}, "sequences x length"),
        ({"calibration": TOKENS_SL.to("meta")}, "is on the device meta, where tensors have no values"),
        ({"calibration": TOKENS_SL.float()}, "tokens must be integers"),
        ({"calibration": TOKENS_SL + 96}, "the model knows 0 to 95"),
        ({"calibration": TOKENS_SL.repeat(1, 5)}, "has sequences of 80 tokens, and the model takes 64"),
        ({"calibration": TOKENS_SL, "sequences": 3}, "calibration is tokens already"),
        ({"calibration": []}, "a list of strings"),
        ({"calibration": {"corpus": "c4"}}, r"tokens \(a torch tensor\) or a Calibration was expected"),
        ({"calibration": [[1, 2], [3, 4]]}, "and tokens a torch tensor, got \\[\\[1, 2"),
        (
            {"calibration": "The quick brown fox. " * 100},
            r"brown f\.\.\. \(str\) is neither a corpus nor a file.*\[text\]",
        ),
        ({"outliers": "128:256"}, "128:256 keep every weight, since 2:4 removes 128 of 256"),
        ({"skip": "up_proj"}, "skip takes a list of regular expressions, got 'up_proj'"),
        ({"skip": ["("]}, r"skip holds '\(', which is no regular expression"),
        (
            {"skip": ["up_proj", "upproj"]},
            "'upproj' is found in no name inside the model's blocks, such as model.layers.0",
        ),
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:99"}, "GPU"),
        ({"batch_tokens": 0}, "batch_tokens must be a positive integer"),
        ({"batch_tokens": 1.5}, "batch_tokens must be a positive integer, got 1.5"),
        ({"calibration": ""}, r"wikitext2\. A text itself comes in a list"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_change_nothing(how: dict[str, Any], words: str) -> None:
    model, dense = tiny("llama"), tiny("llama")
    with pytest.raises(ValueError, match=words) as caught:
        esparse.prune(model, None, **{"calibration": TOKENS_SL} | how)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: esparse.perplexity(m, None, TOKENS_SL, length=4), "length and max_tokens are for texts"),
        (lambda m: esparse.perplexity(m, None, TOKENS_SL, max_tokens=4), "length and max_tokens are for texts"),
        (lambda m: esparse.perplexity(m, None, TOKENS_SL, batch_tokens=-1), "batch_tokens must be a positive integer"),
        (lambda m: esparse.perplexity(m, "gpt2", ["a text"]), "must be a tokenizer of transformers.*got 'gpt2'"),
        (lambda m: esparse.prune(m, "gpt2", calibration=["a text"]), "must be a tokenizer of transformers"),
        (lambda m: esparse.save(m, None, None, "x"), "report must be what esparse.prune returned.*got None"),
        (lambda m: esparse.pack(m, {"layers": []}), "report must be what esparse.prune returned"),
        (lambda m: esparse.save(m, None, pruned(m, shuffle=None), "x", packed="no"), "packed must be True or False"),
        (lambda m: esparse.option("metric", None), "an option of metric is named by a text, got None"),
        (lambda m: esparse.option(["metric"], "wanda"), "a group is named by a text"),
        (lambda m: esparse.register("metric", None, Squares), "must be one word"),
    ],
)
def test_arguments_of_the_other_functions(call: Callable[[PreTrainedModel], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call(tiny("llama"))
    assert "\n" not in str(caught.value)
