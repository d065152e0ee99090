"""What the Hub reads at the top of a model card: licence, original, task, corpora, and the measured numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("esparse")

CORPORA = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}  # the Hub's names of those that have one there
LICENCE = ("license", "license_name", "license_link")


def licence_of(folder: Path | None) -> dict[str, str]:
    """The licence that the original's own card names; empty if there is no such card, or none is named."""
    from huggingface_hub import metadata_load

    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return {}
    try:
        metadata = metadata_load(card) or {}
    except ValueError as error:  # no YAML, of someone else
        log.warning("the licence cannot be taken over from %s: %s", card, str(error).partition("\n")[0])
        return {}
    return {name: metadata[name] for name in LICENCE if isinstance(metadata.get(name), str)}


def metadata(record: dict[str, Any], facts: dict[str, Any], *, original: str | None) -> str:
    """The YAML between the dashes; `original`: the model's name on the Hub, None if it has none there."""
    from huggingface_hub import ModelCardData

    sparsity, corpora = record["sparsity"], [record["config"]["calibration"]["corpus"], *record["quality"]]
    pattern = sparsity["pattern"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse", "pruned", "esparse", pattern, *(["packed"] if facts["format"] == "packed" else [])],
        datasets=list(dict.fromkeys(CORPORA[name] for name in corpora if name in CORPORA)) or None,
        base_model=original,
        model_name=f"{record['model']['name']}, pruned to {pattern}",
        eval_results=_results(record) or None,
        **facts.get("licence", {}),
    )
    return data.to_yaml()


def _results(record: dict[str, Any]) -> list[Any]:
    """The pruned model's numbers, as the record has them."""
    from huggingface_hub import EvalResult

    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=CORPORA.get(corpus, corpus),
            dataset_name=corpus,
            metric_type="perplexity",
            metric_value=of["pruned"],
            metric_name=f"perplexity, in windows of {of['sequence_length']} tokens",
        )
        for corpus, of in record["quality"].items()
    ]
    found += [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type="accuracy",
            metric_value=of["pruned"],
            metric_name="accuracy, zero-shot",
        )
        for task, of in record.get("zeroshot", {}).items()
        if isinstance(of, dict) and isinstance(of.get("pruned"), float)
    ]
    return found
