"""Every option of every group that belongs to the method prunes a model from the first block to the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch

import esparse
from esparse.records.groups import ANY, GROUPS, METHOD_GROUPS
from tests.models.families import tiny

ANY_SIGN = {"metric.gamma"}  # numbers that may be negative
ROW = "then"  # the class of options that are several others in a row; no option by itself
OPTIONS = [(group, option) for group in METHOD_GROUPS for option in GROUPS[group].options if option not in (ANY, ROW)]
TOKENS_SL = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_prunes(group: str, option: str) -> None:
    model = tiny("llama")
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    pattern = "8:16" if group == "allocation" else "2:4"  # of 2:4 a layer has one density only
    part = esparse.option(group, option, group=16) if option in ("int4", "int3", "nf4") else option  # 32 and 48 inputs
    report = esparse.prune(model, None, pattern, calibration=TOKENS_SL, **{group: part})
    assert report.to_dict()["config"]["choices"][group] == (option if part is option else type(part).__name__)
    assert report.pattern_holds
    assert report.density == pytest.approx(0.5, abs=0.15 if group == "quantise" else 0.01)  # some are rounded to 0
    assert {name.rpartition(".layers.")[2].partition(".")[0] for name in report.keeps} == {"0", "1", "2"}
    for name, keep_OI in report.keeps.items():
        assert not torch.equal(model.get_parameter(name), dense[name])
        assert not model.get_parameter(name)[~keep_OI].any()
    assert torch.isfinite(model(TOKENS_SL).logits).all()


def numbers_of(group: str, option: str) -> Iterator[tuple[str, float]]:
    part = esparse.option(group, option)
    for name in (field.name for field in fields(part) if "float" in str(field.type)):
        if isinstance(value := getattr(part, name), float):
            yield name, value


@pytest.mark.parametrize("group", METHOD_GROUPS)
def test_a_setting_that_is_no_number_or_out_of_bounds_is_refused_at_once(group: str) -> None:
    for option in (option for of_group, option in OPTIONS if of_group == group):
        for name, usual in numbers_of(group, option):
            wrong = [float("nan"), float("inf"), -float("inf"), *([] if f"{group}.{name}" in ANY_SIGN else [-1.0])]
            for value in wrong:
                with pytest.raises(ValueError, match=f"{group}.{name}|{group} needs"):
                    esparse.option(group, option, **{name: value})
            assert getattr(esparse.option(group, option, **{name: usual}), name) == usual


def test_a_histogram_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric.bins must be at least 2.* and at most 65536; got 1000000000"):
        esparse.option("metric", "entropy", bins=10**9)
