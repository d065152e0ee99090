"""Which engines can make use of an export, in words, for its record, its card and the terminal (docs/serving.md)."""

from __future__ import annotations

from typing import Any


def usable_by(kind: str, pattern: str, facts: dict[str, Any]) -> str:
    """`kind`: dense or packed; `facts`: in how many layers the pattern holds as stored (holds_in, of_layers)."""
    if kind == "packed":
        refused = facts["packed_experts"] or facts["dense_experts"] or "grid" in facts
        served = "" if refused else ", and vLLM once esparse is installed there"
        return f"transformers loads it after import esparse{served}"
    loads = "whatever loads a Hugging Face checkpoint takes it as a dense model"
    if facts["holds_in"] == 0:
        return f"{loads}, and none finds its groups"
    if pattern != "2:4":
        return f"{loads}; no engine that is known computes {pattern} faster than dense from it"
    some = "" if facts["holds_in"] == facts["of_layers"] else " where the pattern holds"
    return f"{loads}; cuSPARSELt can use its 2:4{some}, in 16 bits (so should TensorRT-LLM, which is untried)"
