"""A folder of configuration of one's own, in front of esparse's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from esparse.parts.conf_folder import conf_folder, own_folder
from tests.workshop import launch


def test_what_lies_there_replaces_what_esparse_has_and_adds_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "hydra" / "launcher"
    place.mkdir(parents=True)
    theirs = (conf_folder() / "hydra" / "launcher" / "site.yaml").read_text()
    (place / "site.yaml").write_text(theirs.replace("partition: null", "partition: mine"))
    shutil.copytree(conf_folder() / "metric", tmp_path / "metric", dirs_exist_ok=True)
    (tmp_path / "metric" / "sharp.yaml").write_text("defaults: [entropy, _self_]\ngamma: 0.25\n")
    monkeypatch.setenv("ESPARSE_CONF", str(tmp_path))
    done = launch("--cfg", "all", "hydra/launcher=a100", "metric=sharp")
    assert done.returncode == 0, done.stderr
    assert "partition: mine" in done.stdout  # a100 builds on site
    assert "gamma: 0.25" in done.stdout
    assert f"{tmp_path} stands in front of esparse's own configuration" in done.stderr


def test_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESPARSE_CONF", "/nowhere")
    done = launch("--cfg", "job")
    assert (done.returncode, done.stderr) == (2, "esparse: ESPARSE_CONF=/nowhere: there is no such folder\n")
    monkeypatch.delenv("ESPARSE_CONF")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert own_folder() is None
    (tmp_path / "esparse").mkdir()
    assert own_folder() == tmp_path / "esparse"
