"""The rows of esparse's own tasks, as lm-eval asks for them."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict

from esparse.data.choices import questions


def builtin_questions(**_: Any) -> DatasetDict:
    """The questions of `zeroshot=builtin` as the one split of a data set."""
    return DatasetDict({"held-out": Dataset.from_list([dict(question) for question in questions()])})
