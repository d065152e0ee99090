"""Zero-shot tasks: lm-eval's own definitions over local rows, against lm-eval's own Hugging Face model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from esparse.evaluate.zeroshot import ZeroShot, definition, task_file
from esparse.models.blocks import BlockModel
from esparse.models.load import BUILTIN, Model, load
from tests.evaluate.local_tasks import SPLITS, write
from tests.workshop import launch

ESPARSE = ["hellaswag", "piqa", "openbookqa", "sciq", "logiqa"]
WANDA = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
CHOICES = sorted({*ESPARSE, *WANDA})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), *SPLITS)


def asked(tasks: list[str], **settings: Any) -> ZeroShot:
    return ZeroShot(**({"tasks": tasks, "data": None, "limit": None, "shots": None, "score": "acc"} | settings))


def tiny_model(store: str = "memory", folder: Path = Path("unused")) -> tuple[BlockModel, Any]:
    settings = Model(
        path="builtin", name="tiny", revision=None, dtype="float32", devices="cpu", batch_tokens=None, store=store,
        activations="host", skip=[], trust_remote_code=False,
    )  # fmt: skip
    model, tokenizer, weights = load(settings, folder)
    return BlockModel(model, device=torch.device("cpu"), batch_tokens=512, store=weights), tokenizer


@pytest.mark.tries(1)
@pytest.mark.parametrize("longest", [256, 24])
def test_equals_lm_evals_own_model(data: Path, longest: int) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    blocks, tokenizer = tiny_model()
    zeroshot = asked(sorted(SPLITS), data=str(data), shots=0)
    loaded = zeroshot.load()
    theirs = HFLM(pretrained=blocks.model, tokenizer=tokenizer, batch_size=4, max_length=longest, device="cpu")
    expected = evaluate(lm=theirs, task_dict=loaded, bootstrap_iters=10, log_samples=False)["results"]
    got = zeroshot.measure(loaded, blocks, tokenizer, longest)
    assert list(got) == sorted(SPLITS)
    for task, scores in got.items():
        assert scores["n"] == 12
        for measure, (value, stderr) in scores["measures"].items():
            assert value == pytest.approx(expected[task][f"{measure},none"], rel=1e-4), (task, measure)
            if measure in ("acc", "acc_norm"):
                assert stderr == pytest.approx(expected[task][f"{measure}_stderr,none"])
    assert {"acc", "acc_norm"} <= got["hellaswag"]["measures"].keys()
    # Contexts that were cut are counted, by task.
    cut = {task: scores["cut"] for task, scores in got.items()}
    if longest == 256:
        assert set(cut.values()) == {0}
    else:
        assert cut["hellaswag"] > 0 and sum(cut.values()) <= sum(24 * 12 for _ in cut)
    assert got["wikitext"]["measures"]["word_perplexity"][0] > 100


def test_requests_are_answered_as_lm_evals_own_model_does() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from esparse.evaluate.harness import BlockLM

    blocks, tokenizer = tiny_model()
    pairs = [
        ("", "Hello there"),
        ("A ", "b"),
        ("def f(x):\n", "    return x\n"),
        ("x" * 300, " long"),
        ("import", " os"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("Hello there", "the words of it " * 40)]
    theirs = HFLM(pretrained=blocks.model, tokenizer=tokenizer, batch_size=2, max_length=64, device="cpu")
    mine = BlockLM(blocks, tokenizer, 64, lambda index: None)
    for got, expected in zip(mine.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert got[0] == pytest.approx(expected[0], rel=1e-4) and got[1] == expected[1]
    assert mine.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), rel=1e-4)


def test_weights_that_are_read_block_by_block_give_the_same(data: Path, tmp_path: Path) -> None:
    zeroshot = asked(["hellaswag", "boolq"], data=str(data))
    loaded = zeroshot.load()
    results = [zeroshot.measure(loaded, *tiny_model(store, tmp_path), 256) for store in ("memory", "shards")]
    assert results[0] == results[1]


def test_parquet_and_limit_and_shots(tmp_path: Path) -> None:
    folder = write(tmp_path, "piqa", "openbookqa", kind="parquet")
    with pytest.raises(ValueError, match=r"examples of the task piqa come from .*/piqa/train"):
        asked(["piqa"], data=str(folder), shots=2).load()
    for task in ("piqa", "openbookqa"):
        shutil.copy(folder / task / f"{SPLITS[task]}.parquet", folder / task / "train.parquet")
    loaded = asked(["piqa", "openbookqa"], data=str(folder), limit=5, shots=2).load()
    blocks, tokenizer = tiny_model()
    scores = asked(["piqa", "openbookqa"], data=str(folder), limit=5).measure(loaded, blocks, tokenizer, 256)
    assert {task: s["n"] for task, s in scores.items()} == {"piqa": 5, "openbookqa": 5}
    assert loaded["tasks"]["piqa"].instances[0].args[0].count("Question:") == 3


def test_the_definitions_are_lm_evals_own() -> None:
    for task, split in SPLITS.items():
        file = task_file(task)
        assert file is not None
        own = definition(file)
        test_split = own.get("test_split", "null")
        assert own["task"] == task
        assert (own["validation_split"] if test_split == "null" else test_split) == split
    assert definition(task_file("arc_challenge"))["dataset_path"] == "allenai/ai2_arc"  # which its file includes
    assert task_file("no_such_task") is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ["piqa", "piqa"]}, "names piqa twice"),
        ({"tasks": [], "limit": 0}, "limit must be at least 1 question or null, got 0"),
        ({"tasks": [], "shots": -1}, "shots must not be negative"),
        ({"tasks": [], "data": "/no/such"}, "zeroshot.data=/no/such is no folder"),
        # lm-eval looks through all its tasks, which takes seconds.
        pytest.param({"tasks": ["helaswag"]}, "knows no task 'helaswag'; near it: hellaswag", marks=pytest.mark.slow),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        asked(settings.pop("tasks"), **settings)


def test_local_copies_that_are_not_there(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"piqa needs {tmp_path}/piqa/validation.jsonl or .*, found no such folder"):
        asked(["piqa"], data=str(tmp_path)).load()
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "validation.jsonl").write_text("{}\n")  # it is measured on the split test
    with pytest.raises(ValueError, match=r"arc_easy/test.jsonl or test.json or test.parquet, found validation.jsonl"):
        asked(["arc_easy"], data=str(tmp_path)).load()
    (tmp_path / "sciq").mkdir()
    for text in ('{"question": "Which?"}\n', "not JSON\n"):
        (tmp_path / "sciq" / "test.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"files in .*/sciq are not what the task sciq reads"):
            asked(["sciq"], data=str(tmp_path)).load()
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    with pytest.raises(ValueError, match="the task gsm8k generates text"):
        asked(["gsm8k"], data=str(tmp_path)).load()


def test_without_the_hub_a_task_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"data of the task sciq is not in .* zeroshot.data=DIR with DIR/sciq/"):
        asked(["sciq"]).load()


@pytest.mark.slow
def test_a_run_measures_the_dense_and_the_pruned_model(tmp_path: Path) -> None:
    overrides = ["zeroshot=builtin", "zeroshot.limit=20", "shuffle=none", "pattern=1:4", "tracking=none"]
    overrides += ["calibration.sequences=4", "calibration.length=64", "evaluate.max_tokens=512", "evaluate.length=64"]
    done = launch("-m", *overrides, "metric=wanda,magnitude", f"output_root={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "one").glob("*/result.json"))]
    assert len(records) == 2
    runs = {record["zeroshot"]["builtin"]["dense_run"] for record in records}
    assert len(runs) == 1 and runs <= {record["id"] for record in records}  # the second one takes it over
    for record in records:
        task = record["zeroshot"]["builtin"]
        assert (task["n"], task["score"]) == (20, "acc")
        assert task["measures"]["acc"] == {key: task[key] for key in ("dense", "pruned", "stderr", "dense_stderr")}
        assert task["stderr"] == pytest.approx((task["pruned"] * (1 - task["pruned"]) / 19) ** 0.5)
        assert record["seconds_by_stage"]["zeroshot"] > 0
    assert "builtin pruned" in " ".join(done.stdout.split())
    # Two processes share the questions, and come to the same.
    done = launch(*overrides, "metric=wanda", "model.devices=cpu:2", f"output_root={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    shared = json.loads(next((tmp_path / "two").glob("*/result.json")).read_text())
    alone = next(record for record in records if record["id"] == shared["id"])
    assert shared["zeroshot"]["builtin"]["measures"] == alone["zeroshot"]["builtin"]["measures"]


@pytest.mark.slow
def test_the_builtin_model_knows_how_a_text_goes_on() -> None:
    blocks, tokenizer = tiny_model()
    assert BUILTIN.is_dir()
    zeroshot = asked(["builtin"], limit=100)
    scores = zeroshot.measure(zeroshot.load(), blocks, tokenizer, 512)
    assert scores["builtin"]["measures"]["acc"][0] > 0.4  # chance is 0.25


def test_contexts_that_are_cut_are_counted_said_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    blocks, tokenizer = tiny_model()
    zeroshot = asked(["builtin"], limit=5)
    loaded = zeroshot.load()
    assert zeroshot.measure(loaded, blocks, tokenizer, 2048)["builtin"]["cut"] == 0
    assert "lost their beginning" not in caplog.text
    scores = zeroshot.measure(loaded, blocks, tokenizer, 72)
    assert 0 < scores["builtin"]["cut"] <= 20  # four answers to each of five questions
    said = f"builtin: {scores['builtin']['cut']} contexts are longer than the 72 tokens that the model takes"
    assert said in caplog.text
    assert zeroshot.report(scores, scores, "run")["builtin"]["cut"] == scores["builtin"]["cut"]


def test_a_score_that_a_task_lacks_is_said(caplog):
    scores = {"builtin": {"n": 5, "measures": {"acc": (0.5, 0.1), "acc_norm": (0.6, 0.1)}}}
    report = asked(["builtin"], score="f1").report(scores, scores, "run")
    assert report["builtin"]["score"] == "acc"
    assert caplog.messages == ["builtin has no f1 (zeroshot.score): tables show its acc; there is acc, acc_norm"]
    caplog.clear()
    assert asked(["builtin"], score="acc_norm").report(scores, scores, "run")["builtin"]["score"] == "acc_norm"
    assert not caplog.messages
