"""Hand-made rows in the schemas of the data that lm-eval's own task definitions read: they say nothing of a model."""

from __future__ import annotations

import json
from pathlib import Path

COLOURS = ["red", "green", "blue", "white", "black", "grey", "brown", "pink"]


def _row(task: str, i: int) -> dict:
    right, wrong = COLOURS[i % 8], COLOURS[(i + 3) % 8]
    letters = {"text": [right, wrong, "none", "all"], "label": ["A", "B", "C", "D"]}
    return {
        "hellaswag": {
            "ind": i, "activity_label": "Painting", "ctx_a": f"A wall is {right}.", "ctx_b": "someone paints it",
            "ctx": "", "endings": [right, f"{wrong} [step] twice", "not at all", "and leaves"], "source_id": "x",
            "split": "val", "split_type": "indomain", "label": str(i % 4),
        },
        "piqa": {"goal": f"Make a wall {right}", "sol1": f"use {right} paint", "sol2": f"use {wrong}", "label": i % 2},
        "openbookqa": {
            "id": str(i), "question_stem": f"A {right} thing is", "choices": letters, "answerKey": "ABCD"[i % 4],
        },
        "sciq": {
            "question": f"Which colour has {right} paint?", "distractor1": wrong, "distractor2": "none",
            "distractor3": "all of them", "correct_answer": right, "support": f" Paint that is {right} looks so.",
        },
        "logiqa": {
            "label": "abcd"[i % 4], "context": f"Every wall is {right}.", "question": "What is a wall?",
            "options": [right, wrong, "none", "all"],
        },
        "boolq": {"passage": f"Walls are {right}.", "question": f"are walls {right}", "idx": i, "label": i % 2},
        "rte": {"sentence1": f"Walls are {right}.", "sentence2": f"Walls are {wrong}.", "idx": i, "label": i % 2},
        "winogrande": {
            "sentence": f"The wall took the paint because _ was {right}.", "option1": "the wall",
            "option2": "the paint", "answer": "12"[i % 2],
        },
        "arc_easy": {"id": str(i), "question": f"What is {right}?", "choices": letters, "answerKey": "ABCD"[i % 4]},
        "arc_challenge": {"id": str(i), "question": f"Who is {right}?", "choices": letters, "answerKey": "ABCD"[i % 4]},
        "wikitext": {"page": f" = Colours = \n\n Walls are {right} , and paint is {wrong} . " * (i + 1)},
        "lambada_openai": {"text": f"A wall that is {right} took paint, and it was {right}"},
    }[task]  # fmt: skip


# The split that each task is measured on.
SPLITS = {"hellaswag": "validation", "piqa": "validation", "openbookqa": "test", "sciq": "test", "logiqa": "test"}
SPLITS |= {"boolq": "validation", "rte": "validation", "winogrande": "validation", "arc_easy": "test"}
SPLITS |= {"arc_challenge": "test", "wikitext": "test", "lambada_openai": "test"}


def write(folder: Path, *tasks: str, rows: int = 12, kind: str = "jsonl") -> Path:
    """Puts local copies of these tasks' data into the folder; returns it."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        file = folder / task / f"{SPLITS[task]}.{kind}"
        if kind == "jsonl":
            file.write_text("".join(json.dumps(_row(task, i)) + "\n" for i in range(rows)))
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist([_row(task, i) for i in range(rows)]), file)
    return folder
