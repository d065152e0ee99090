"""What the card of a quantised model says of its grid."""

from __future__ import annotations

from esparse.export.card import _grid


def test_the_card_states_the_grid() -> None:
    asked = {"group": 64, "scale": "float16", "symmetric": False}
    record = {
        "config": {"quantise": asked, "choices": {"quantise": "int4"}},
        "memory": {"bits_per_weight": 3.0625},
    }
    (line,) = _grid(record)
    assert "int4's levels" in line and "one float16 scale and one zero point for 64 columns of a row" in line
    assert "3.062 bits" in line and line.endswith("in the checkpoint's precision.")
    assert _grid(record, as_codes=True)[0].endswith("stored so.")
    record["config"]["quantise"] = {"group": None, "scale": "bfloat16"}
    assert "one bfloat16 scale for a row" in _grid(record)[0]
    assert not _grid({"config": {"choices": {"quantise": "none"}}}) and not _grid({"config": {"choices": {}}})
