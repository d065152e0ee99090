"""The model card of an export: how the model was made, what was measured, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esparse.export.hub_metadata import metadata
from esparse.records.groups import METHOD_GROUPS, acts

LOAD = """```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
inputs = tokenizer("The quick brown fox", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""


def dense_card(record: dict[str, Any], facts: dict[str, Any]) -> str:
    """The card of an ordinary checkpoint with zeros."""
    how = "An ordinary Hugging Face checkpoint: pruned weights are zeros, so it is as large as the dense model."
    pattern = record["sparsity"]["pattern"]
    how += f" {pattern} holds as stored in {facts['holds_in']} of {facts['of_layers']} layers."
    if _no_groups(record, facts):
        how += (
            " Groups were cut in shuffled orders of the columns (`orders.safetensors` of the run), and the columns "
            "stand in their own order here: kernels for n:m would not find groups in it."
        )
    return _card(record, facts, how, "")


def packed_card(record: dict[str, Any], facts: dict[str, Any]) -> str:
    """The card of a checkpoint in esparse's format."""
    how = (
        f"In esparse's packed format: {facts['packed_layers']} layers are stored without their zeros, as values and "
        "an index, and the model computes from these. It needs the Python package esparse: once that is imported, "
        "transformers knows the format. A file that is damaged or cut short is refused by its checksum."
    )
    if facts["packed_experts"]:
        how += (
            f" So are {facts['packed_experts']} experts, which get their zeros back one at a time while they compute."
        )
    if facts["dense_experts"]:
        how += (
            f" {facts['dense_experts']} experts are dense, {facts['dense_expert_bytes']:,} bytes with their zeros: "
            f"{facts['why_dense']}."
        )
    if facts["gathers"]:
        how += f" The channels of {facts['gathers']} tensors are gathered while it runs; all else was absorbed."
    return _card(record, facts, how, "import esparse  # noqa: F401  transformers then knows the format\n")


def _card(record: dict[str, Any], facts: dict[str, Any], how: str, first: str) -> str:
    title = ", columns in their original order (no groups)" if _no_groups(record, facts) else ""
    name, sparsity, config = record["model"]["name"], record["sparsity"], record["config"]
    choices = ", ".join(f"{group}={option}" for group, option in config["choices"].items() if group in METHOD_GROUPS)
    calibration = config["calibration"]
    lines = [
        "---",
        metadata(record, facts, original=_on_hub(config["model"]["path"])),
        "---",
        "",
        f"# {name}, pruned to {sparsity['pattern']}{title}",
        "",
        how,
        "",
        "## Recipe",
        "",
        f"- made by esparse {record['environment']['esparse']} from `{_public(config['model']['path'])}`, run "
        f"`{record['id']}`",
        f"- pattern {sparsity['pattern']}: {100 * sparsity['density']:.2f} % of the pruned layers' "
        f"{record['model']['pruned_parameters']:,} weights are left",
        *_share(sparsity),
        *_grid(record, as_codes="grid" in facts),
        f"- {choices}",
        f"- `python -m esparse {_command(record)}`, other settings as its record `{record['id']}` has them",
        f"- calibrated on {calibration['sequences']} sequences of {calibration['corpus'] or 'a text'}, seed "
        f"{calibration['seed']}",
        "",
        "## Measured",
        "",
        *_numbers(record),
        f"- {facts['bytes']:,} bytes of tensors in {facts['dtype']}",
        f"- {facts['engines']}",
        "",
        "## Loading",
        "",
        LOAD.format(first=first),
        "",
    ]
    return "\n".join(lines)


def _command(record: dict[str, Any]) -> str:
    """The choices of the command line, without folders."""
    config = record["config"]
    model = "" if config["model"]["path"] == "builtin" else f"model=hf model.path={_public(config['model']['path'])} "
    chosen = [f"{group}={option}" for group, option in config["choices"].items() if group in METHOD_GROUPS]
    if config.get("shuffle", {}).get("foldable"):
        chosen.append("shuffle.foldable=true")
    return f"{model}pattern={record['sparsity']['pattern'].partition('+')[0]} {' '.join(chosen)}"


def _on_hub(path: str) -> str | None:
    """The model's name if it is one of the Hub's: owner/name, and no folder here."""
    return path if "/" in path and _public(path) == path else None


def _public(path: str) -> str:
    """A model's name on the hub, or a folder's last part, so that the card does not show the folder's place."""
    place = Path(path).expanduser()
    private = place.is_absolute() or place.exists() or path.startswith((".", "~")) or path.count("/") > 1
    return place.name if private else path


def _numbers(record: dict[str, Any]) -> list[str]:
    if not record["quality"]:
        return ["- no perplexity was measured"]
    head = ["| perplexity on | tokens, in windows of | dense | pruned |", "|---|---|---|---|"]
    rows = [
        f"| {corpus} | {of['tokens']:,}, {of['sequence_length']} | {of['dense']:.2f} | {of['pruned']:.2f} |"
        for corpus, of in record["quality"].items()
    ]
    return [*head, *rows, ""]


def _grid(record: dict[str, Any], *, as_codes: bool = False) -> list[str]:
    """To what kept values were rounded; nothing if they were not."""
    asked = record["config"].get("quantise") or {}
    option = record["config"]["choices"].get("quantise")
    if not acts("quantise", option):
        return []
    group = "a row" if asked.get("group") is None else f"{asked['group']} columns of a row"
    zero = "" if asked.get("symmetric", True) else " and one zero point"
    bits = f"{record['memory']['bits_per_weight']:.3f}"
    return [
        f"- every kept value is one of {option}'s levels times a scale: one {asked['scale']} scale{zero} for {group}, "
        f"in the order in which groups were cut. As codes a weight takes {bits} bits; here values are stored "
        + ("so." if as_codes else "in the checkpoint's precision.")
    ]


def _share(sparsity: dict[str, Any]) -> list[str]:
    """The share of the blocks that was pruned, and what stayed dense; empty if the record's version lacks it."""
    if "share_of_blocks" not in sparsity:
        return []
    names = [f"`{name}`" for name in sparsity["left_dense"]]
    left = f"; dense stay {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
    return [f"- {100 * sparsity['share_of_blocks']:.1f} % of the blocks' weights were pruned{left}"]


def _no_groups(record: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether a shuffle's groups are lost in the columns' own order."""
    return facts["format"] == "dense" and facts["order"] == "original" and _shuffled(record)


def _shuffled(record: dict[str, Any]) -> bool:
    return acts("shuffle", record["config"]["choices"]["shuffle"])
