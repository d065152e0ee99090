"""The joints of the literature, on stand-in files in a stand-in Hugging Face cache."""

from __future__ import annotations

import subprocess
import sys

import huggingface_hub
import pytest

from esparse.data import builtin, corpora, hub
from tests.data.stand_ins import put

ROWS = ["", " = Title = \n", "", " First row .\n", " Second . \n"]


def test_wikitext2_as_the_literature_joins_it(cache):
    put(cache, "wikitext2", "calibration", ROWS)
    put(cache, "wikitext2", "evaluation", ROWS)
    train, test = corpora.read("wikitext2", "calibration"), corpora.read("wikitext2", "evaluation")
    assert list(train.texts) == ["  = Title = \n   First row .\n  Second . \n"]
    assert list(test.texts) == ["\n\n = Title = \n\n\n\n\n First row .\n\n\n Second . \n"]
    assert not train.apart and not test.apart and test.most_windows is None


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_ptb_is_joined_by_blanks(cache, purpose):
    put(cache, "ptb", purpose, ["a <unk> b", "c N d"])
    assert list(corpora.read("ptb", purpose).texts) == ["a <unk> b c N d"]


def test_c4_validation_is_the_first_1100_documents(cache):
    put(cache, "c4", "evaluation", [f"document {i}" for i in range(1200)])
    corpus = corpora.read("c4", "evaluation")
    assert list(corpus.texts) == [" ".join(f"document {i}" for i in range(1100))]
    assert corpus.most_windows == 256


def test_c4_calibration_keeps_its_documents_apart(cache):
    put(cache, "c4", "calibration", [f"document {i}" for i in range(30)])
    corpus = corpora.read("c4", "calibration")
    assert corpus.apart and len(corpus.texts) == 30
    assert [corpus.texts[i] for i in (29, 0)] == ["document 29", "document 0"]


def test_the_hub_names_are_those_of_the_literature():
    where = {(name, purpose): text.source for name, by in corpora.HUB.items() for purpose, text in by.items()}
    wikitext, ptb = "Salesforce/wikitext", "ptb-text-only/ptb_text_only"
    assert where == {
        ("wikitext2", "calibration"): hub.HubFile(wikitext, "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
        ("wikitext2", "evaluation"): hub.HubFile(wikitext, "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        ("c4", "calibration"): hub.HubFile("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
        ("c4", "evaluation"): hub.HubFile("allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
        ("ptb", "calibration"): hub.HubFile(ptb, "penn_treebank/train/0000.parquet", "refs/convert/parquet"),
        ("ptb", "evaluation"): hub.HubFile(ptb, "penn_treebank/test/0000.parquet", "refs/convert/parquet"),
    }


def test_builtin_and_text(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "texts", lambda split: [f"of {split}", "more"])
    assert corpora.read("builtin", "calibration").texts == ["of train", "more"]
    assert corpora.read("builtin", "evaluation").texts == ["of held-out", "more"]
    (tmp_path / "mine.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    mine = corpora.read("text", "evaluation", path=str(tmp_path / "mine.jsonl"), column="body")
    assert mine == corpora.Corpus(name="mine.jsonl", texts=["a\n\nb"])


def test_settings_that_fit_no_corpus():
    with pytest.raises(ValueError, match="out of builtin, wikitext2, c4, ptb, text, got 'wiki'"):
        corpora.check(["wiki"], "calibration", None)
    with pytest.raises(ValueError, match=r"'text' needs a file: evaluate.path=FILE"):
        corpora.check(["builtin", "text"], "evaluation", None)
    with pytest.raises(ValueError, match=r"calibration.path=a.txt is read by calibration=text only"):
        corpora.check(["builtin"], "calibration", "a.txt")


@pytest.mark.parametrize(("purpose", "group"), [("calibration", "calibration"), ("evaluation", "evaluate")])
def test_offline_and_not_cached_names_the_way_out(purpose, group):
    with pytest.raises(ConnectionError) as raised:
        corpora.read("ptb", purpose)
    said = str(raised.value)
    assert f"{group}=text {group}.path=FILE" in said and "offline mode is enabled" in said and "\n" not in said
    assert "hf download --repo-type dataset --revision refs/convert/parquet ptb-text-only/ptb_text_only penn_tr" in said
    assert isinstance(raised.value.__cause__, huggingface_hub.errors.OfflineModeIsEnabled)


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    asked = []

    def refuse(url, **settings):
        asked.append((url, settings))
        raise OSError("[Errno -2] Name or service not known\nmore lines")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("must not be tried"))
    with pytest.raises(ConnectionError, match=r"could not be fetched \(\[Errno -2\] Name or service not known\): "):
        corpora.read("wikitext2", "evaluation")
    url, settings = asked[0]
    assert len(asked) == 1 and settings == {"timeout": hub.ANSWER_S}
    assert url.endswith("/datasets/Salesforce/wikitext/resolve/main/wikitext-2-raw-v1/test-00000-of-00001.parquet")


def test_a_file_that_is_not_cached_is_downloaded(cache, monkeypatch):
    file = put(cache, "ptb", "evaluation", ["a", "b"]).rename(cache / "downloaded.parquet")
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(file))
    assert list(corpora.read("ptb", "evaluation").texts) == ["a b"]
    where = ("ptb-text-only/ptb_text_only", "penn_treebank/test/0000.parquet")
    assert asked == [(where, {"repo_type": "dataset", "revision": "refs/convert/parquet"})]


def test_the_stand_in_cache_is_laid_out_as_the_client_does(cache):
    file = put(cache, "ptb", "evaluation", ["a"])
    source = corpora.HUB["ptb"]["evaluation"].source
    found = huggingface_hub.hf_hub_download(source.repo, source.file, repo_type="dataset", revision=source.revision)
    assert found == str(file)


def test_the_components_are_quick_to_import():
    code = "import sys, esparse.data.calibration, esparse.data.windows; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert loaded.isdisjoint({"torch", "transformers", "datasets", "numpy", "pyarrow", "huggingface_hub"})
