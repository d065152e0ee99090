"""Every YAML of the two groups composes into its component."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from esparse.data.calibration import Calibration
from esparse.data.windows import Perplexity
from tests.composing import composing

CONF = Path(__file__).parents[2] / "conf"
GROUPS = {"calibration": Calibration, "evaluate": Perplexity}
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


@pytest.fixture(autouse=True, scope="module")
def register():
    store = ConfigStore.instance()
    for group, node in GROUPS.items():
        store.store(group=f"schema/{group}", name="any", node=node)
    store.store(name="only_data", node={"defaults": ["_self_"], "seed": 11})


def component(group: str, choice: str, *overrides: str):
    with composing():
        return OmegaConf.to_object(compose("only_data", [f"+{group}={choice}", *overrides]))[group]


def test_every_choice_is_there():
    assert {choice for group, choice in CHOICES if group == "calibration"} == {
        "builtin",
        "wikitext2",
        "c4",
        "ptb",
        "text",
    }
    assert {choice for group, choice in CHOICES if group == "evaluate"} == {
        *("builtin", "wikitext2", "c4", "ptb", "text", "paper", "none")
    }


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_choice_becomes_its_component(group, choice):
    path = [f"{group}.path=a.txt"] if choice == "text" else []
    made = component(group, choice, *path)
    assert type(made) is GROUPS[group]
    assert (CONF / group / f"{choice}.yaml").read_text().startswith("# ")
    if group == "calibration":
        assert (made.corpus, made.sequences, made.length, made.seed) == (choice, 128, None, 11)
    else:
        several = {"paper": ["wikitext2", "c4", "ptb"], "none": []}
        assert made.corpora == several.get(choice, [choice]) and made.length is None
        assert made.max_tokens == (65536 if choice == "builtin" else None)


@pytest.mark.parametrize("group", GROUPS)
def test_mistakes_stop_before_any_work(group):
    with pytest.raises(ValueError, match=f"'text' needs a file: {group}.path=FILE"):
        component(group, "text")
    with pytest.raises(ValueError, match=f"{group}.path=a.txt is read by {group}=text only"):
        component(group, "builtin", f"{group}.path=a.txt")
    with pytest.raises(ConfigCompositionException, match="lenght"):
        component(group, "builtin", f"{group}.lenght=3")
    with pytest.raises(ConfigCompositionException) as raised:
        component(group, "builtin", f"{group}.length=long")
    assert "could not be converted to Integer" in str(raised.value.__cause__)
