"""Zero-shot accuracy on the tasks of lm-eval (EleutherAI's harness), by lm-eval's own definitions.

Building lm-eval's index of all tasks takes ten seconds. A task's own name is found by its file; only other names (a
group, a tag, a mistake) need the index.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.evaluate.tasks import FOLDER
from esparse.records.sources import CORPUS, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from esparse.models.blocks import BlockModel

log = logging.getLogger("esparse")

BUILTIN = "builtin"
ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of local copies, with the name of the reader
NEAR = {"boolq": "super_glue", "rte": "glue"}  # tasks in folders of another name
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
MEASURED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")  # kinds of task that are measured
BOOTSTRAP = 1000  # resamples, for measures whose standard error has no formula

# For each task n, and the value and standard error of each measure, as plain values that fit into JSON.
Scores = dict[str, dict[str, Any]]


@dataclass(kw_only=True, slots=True)
class ZeroShot:
    """The group `zeroshot`: the tasks that are measured, dense and pruned, and the number of their questions."""

    tasks: list[str]  # `builtin`, or names of tasks, groups or tags of lm-eval
    # None: the cache of Hugging Face, then the hub
    data: str | None = None  # folder of local copies: `DATA/TASK/SPLIT.jsonl`, .json or .parquet
    limit: int | None  # questions of each task, the first ones; None: all
    shots: int | None  # examples in front of each question; None: as the task has it, mostly none
    # The record has all measures (`acc_norm`, ...)
    score: str  # the measure that stands for a task in tables; a task that lacks it has its first one

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise Mistake(f"zeroshot.limit must be at least 1 question or null, got {self.limit}")
        if self.shots is not None and self.shots < 0:
            raise Mistake(f"zeroshot.shots must not be negative, got {self.shots}")
        if doubled := sorted({task for task in self.tasks if self.tasks.count(task) > 1}):
            raise Mistake(f"zeroshot.tasks names {doubled[0]} twice: name each task once")
        if self.data is not None and not Path(self.data).expanduser().is_dir():
            raise Mistake(
                f"zeroshot.data={self.data} is no folder: expected one with <task>/<split>.jsonl, .json or .parquet"
            )
        for task in self.tasks:
            if task != BUILTIN and task_file(task) is None and task not in (known := _index().all_tasks):
                near = difflib.get_close_matches(task, [BUILTIN, *known], n=5)
                hint = f"; near it: {', '.join(near)}" if near else ""
                raise Mistake(f"zeroshot.tasks: lm-eval knows no task {task!r}{hint}")

    def load(self) -> dict[str, Any]:
        """The tasks with their data, in lm-eval's form.

        Raises Mistake for tasks that generate text and for local copies without a needed split; raises ConnectionError
        if data is not in the cache of `datasets` and cannot be fetched.
        """
        if not self.tasks:
            return {"tasks": {}, "groups": {}, "group_map": {}}
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in self.tasks:
            with _quiet():
                parts = self._load(name)
            for part, of_task in parts.items():
                loaded[part] |= of_task
        for name, task in loaded["tasks"].items():
            if task.OUTPUT_TYPE not in MEASURED:
                raise Mistake(
                    f"the task {name} generates text, which is not measured here: choose tasks of multiple choice "
                    "or of likelihoods"
                )
            own = task.get_config("num_fewshot")
            if self.shots and own == 0:  # as in lm-eval
                log.info("the task %s takes no examples: zeroshot.shots=%d is ignored for it", name, self.shots)
            task.set_config(key="num_fewshot", value=own or 0 if self.shots is None or own == 0 else self.shots)
            task.set_fewshot_seed(seed=1234)  # lm-eval's own
        return loaded

    def _load(self, name: str) -> dict[str, Any]:
        from lm_eval.tasks import TaskManager

        if name == BUILTIN:
            return dict(TaskManager(include_path=str(FOLDER), include_defaults=False).load([name]))
        file = task_file(name)
        if file is None:
            if self.data is not None:
                raise Mistake(
                    f"zeroshot.tasks: {name} is a group of tasks, and zeroshot.data has data by task: name its tasks"
                )
            return _from_hub(_index(), name)
        if self.data is None:
            return _from_hub(TaskManager(include_path=str(file.parent), include_defaults=False), name)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "local.yaml").write_text(self._local(name, file, Path(folder)))
            try:
                return dict(TaskManager(include_path=folder, include_defaults=False).load([name]))
            except Exception as cause:  # `datasets` and tasks raise many types
                raise Mistake(
                    f"zeroshot.data: the files in {Path(self.data) / name} are not what the task {name} reads "
                    f"({type(cause).__name__}: {_first_line(cause)})"
                ) from cause

    def _local(self, name: str, file: Path, cache: Path) -> str:
        """The task's definition as YAML, changed to read local files."""
        assert self.data is not None
        own = definition(file)
        wanted = {kind: own[kind] for kind in SPLITS if own.get(kind) not in (None, "null", "")}
        measured = wanted.get("test_split") or wanted.get("validation_split")
        folder = Path(self.data).expanduser() / name
        found = {split: path for split in wanted.values() if (path := _copy(folder, split)) is not None}
        if measured is None:
            raise Mistake(f"the task {name} names no split to be measured on: it cannot have local copies")
        if measured not in found:
            endings = " or ".join(f"{measured}{ending}" for ending in ENDINGS)
            names = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
            raise Mistake(f"zeroshot.data: the task {name} needs {folder}/{endings}, found {names or 'nothing'}")
        examples = wanted.get("fewshot_split") or wanted.get("training_split")
        if self.shots and examples not in (None, *found):
            raise Mistake(f"zeroshot.data: examples of the task {name} come from {folder}/{examples}.*, not there")
        kinds = {ENDINGS[path.suffix] for path in found.values()}
        if len(kinds) > 1:
            raise Mistake(f"zeroshot.data: the files in {folder} are of several kinds: use {' or '.join(ENDINGS)}")
        files = {split: str(path.resolve()) for split, path in found.items()}
        # Reads the files into memory, because the cache of `datasets` would store one more copy.
        reading = {"data_files": files, "keep_in_memory": True, "cache_dir": str(cache / "cache")}
        asked: dict[str, Any] = {"include": str(file), "task": name, "dataset_path": kinds.pop(), "dataset_name": None}
        asked |= {"dataset_kwargs": reading} | {kind: None for kind, split in wanted.items() if split not in found}
        return json.dumps(asked)  # JSON is YAML

    def stamps(self) -> list[str]:
        """Name, size and modification time of every local copy, and the built-in corpus's digest if it is asked for."""
        folders = [] if self.data is None else [Path(self.data).expanduser() / task for task in self.tasks]
        files = sorted(file for folder in folders for file in folder.glob("*.*"))
        corpus = [f"{CORPUS.name} {digest(CORPUS)}"] if BUILTIN in self.tasks else []
        return corpus + [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]

    def measure(
        self,
        loaded: dict[str, Any],
        blocks: BlockModel,
        tokenizer: Tokenizer,
        longest: int,
        on_block: Callable[[int], None] = lambda index: None,
    ) -> Scores:
        """lm-eval's scores from the model's log-likelihoods, by task; a group counts as one task if it has a score.

        `longest`: most tokens of the model. All ranks must call it, and all get the same scores.
        """
        if not loaded["tasks"]:
            return {}
        from lm_eval.evaluator import evaluate

        from esparse.evaluate.harness import BlockLM

        model = BlockLM(blocks, tokenizer, longest, on_block)
        with _quiet():
            results = evaluate(
                lm=model, task_dict=loaded, limit=self.limit, bootstrap_iters=BOOTSTRAP, log_samples=False
            )
        counts, scores = results["n-samples"], {}
        for name in (each for asked in self.tasks for each in self._names(asked, loaded, results["results"])):
            measures = _measures(results["results"][name])
            members = [name] if name in counts else loaded["groups"][name].get_all_tasks()
            n = sum(counts[getattr(m, "task_name", m)]["effective"] for m in members)
            cut = sum(model.cut[getattr(m, "task_name", m)] for m in members)
            scores[name] = {"n": n, "measures": measures, "cut": cut}
            if cut:
                log.warning(
                    "%s: %d contexts are longer than the %d tokens that the model takes and lost their beginning",
                    name,
                    cut,
                    longest,
                )
        return scores

    def _names(self, asked: str, loaded: dict[str, Any], results: dict[str, Any]) -> list[str]:
        """The names of the results for a requested name: its own, or those of the tasks in it."""
        if _measures(results.get(asked, {})):
            return [asked]
        inside = loaded["group_map"].get(asked) or [name for name in loaded["tasks"] if name not in self.tasks]
        return [name for name in inside if _measures(results.get(name, {}))]

    def report(self, dense: Scores, pruned: Scores, dense_run: str) -> dict[str, dict[str, Any]]:
        """The record's entry for each task; `stderr` is the pruned score's."""
        reports = {}
        for task, after in pruned.items():
            before = dense[task]["measures"]
            score = self.score if self.score in before else next(iter(before))
            if score != self.score:
                log.warning(
                    "%s has no %s (zeroshot.score): tables show its %s; there is %s",
                    task,
                    self.score,
                    score,
                    ", ".join(before),
                )
            both = {
                measure: {
                    "dense": before[measure][0],
                    "pruned": value,
                    "stderr": stderr,
                    "dense_stderr": before[measure][1],
                }
                for measure, (value, stderr) in after["measures"].items()
            }
            reports[task] = both[score] | {"n": after["n"], "score": score, "dense_run": dense_run, "measures": both}
            reports[task]["cut"] = after.get("cut", 0)  # number of contexts that were cut
        return reports


def definition(file: Path) -> dict[str, Any]:
    """A task's YAML, with included files merged; functions and numbers stay text."""
    import yaml

    own: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    includes = own.pop("include", [])
    for include in [includes] if isinstance(includes, str) else includes:
        own = definition(file.parent / include) | own
    return own


@cache
def task_file(name: str) -> Path | None:
    """The file in which lm-eval defines the single task of this name; None if there is no such file."""
    import importlib.util

    spec = importlib.util.find_spec("lm_eval")  # finds it without importing it
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent / "tasks"
    says = re.compile(rf"^task: *[\"']?{re.escape(name)}[\"']? *$", re.MULTILINE)
    near = root / NEAR.get(name, name.partition("_")[0])  # most tasks are in such a folder
    for folder in (near, root) if near.is_dir() else (root,):
        for file in sorted(folder.rglob("*.yaml")):
            if says.search(file.read_text(encoding="utf-8")):
                return file
    return None


@cache
def _index() -> Any:
    """lm-eval's own index of tasks, groups and tags."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_hub(manager: Any, name: str) -> dict[str, Any]:
    """One task, group or tag, with its data from the Hugging Face cache or the hub."""
    from esparse.data.hub import from_cache_where_out_of_reach

    with from_cache_where_out_of_reach():
        try:
            return dict(manager.load([name]))
        except Exception as cause:  # hub, `datasets` and network raise many unrelated types
            raise ConnectionError(
                f"the data of the task {name} is not in the Hugging Face cache and could not be fetched "
                f"({_first_line(cause)}): fill the cache on a machine with internet, or give local copies: "
                f"zeroshot.data=DIR with DIR/{name}/<split>.jsonl, .json or .parquet"
            ) from cause


def _first_line(cause: Exception) -> str:
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")


def _copy(folder: Path, split: str) -> Path | None:
    return next((path for ending in ENDINGS if (path := folder / f"{split}{ending}").is_file()), None)


def _measures(result: dict[str, Any]) -> dict[str, list[float | None]]:
    """Value and standard error by measure, from lm-eval's keys `acc,none` and `acc_stderr,none`."""
    measures: dict[str, list[float | None]] = {}
    for key, value in result.items():
        measure, comma, which = key.partition(",")
        if comma and not measure.endswith("_stderr") and isinstance(value, int | float):
            stderr = result.get(f"{measure}_stderr,{which}")
            measures.setdefault(measure, [float(value), stderr if isinstance(stderr, float) else None])
    return measures


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, lm-eval and `datasets` do not print, warn or draw progress bars, because the run has its own bar."""
    logger, before = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
