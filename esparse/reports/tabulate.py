"""The columns of records: settings and measurements, and which of them differ between runs.

A column per choice (metric, shuffle, ...), per setting in which runs of the same choice differ (metric.alpha)
and per measurement. Computed here: ratio = pruned / dense perplexity, means over tasks, means over layers (error =
||X (W - W')^T||_F / ||X W^T||_F, kept = surviving share of the score), and mean and sample standard deviation over
seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from esparse.errors import Mistake
from esparse.records.groups import GROUPS
from esparse.records.report import LATER, NOT_IDENTITY, asks_for_nothing
from esparse.reports.reading import Record, at, keys
from esparse.reports.table import IDS, Table, exact, ids_of, mean, natural, spread, text

# Groups whose options are the first columns, and groups that other columns show.
FRONT = tuple(name for name, group in GROUPS.items() if group.column == "front")
MEASURING = {name for name, group in GROUPS.items() if group.column == "none"}
# Settings without a column: they change no measurement here, or have a column already.
HIDDEN = NOT_IDENTITY | {"pattern", "outliers", "seed", "name", "dry_run", "profile", "bench", "export", "hydra"}
HIDDEN |= {"model.device", "model.name", "evaluate.corpora", "zeroshot.tasks"}

# Measures of a task that are shares of its questions, so that a mean over tasks means something.
SHARES = ("acc", "acc_norm", "exact_match")


def table_of(records: Sequence[Record], *, corpus: str | None = None, sort: str | None = None) -> Table:
    """The columns of these records, in an order to read; perplexities of one corpus, or of all.

    Raises ValueError for a corpus that no run was measured on, or a column to sort by that is not there.
    """
    check_corpus(records, corpus)
    corpora = keys(records, "quality") if corpus is None else [corpus]
    common = _common_tasks(records)
    rows = [_asked(record) | _measured(record, corpora, common) for record in records]
    if not any(record.get("memory", {}).get("bits") for record in records):  # of 16 bits the pattern says it
        for row in rows:
            del row["bits"]
    for group, neutral in ((g, GROUPS[g].neutral) for g in GROUPS if GROUPS[g].method and GROUPS[g].neutral):
        if any(group in row for row in rows):  # it did nothing to runs from before esparse had it
            for row in rows:
                row.setdefault(group, neutral)
    others = sorted({group for record in records for group in _choices(record)} - MEASURING - set(FRONT))
    asked = ["model", *FRONT, *[g for g in others if "/" not in g], "pattern", "outliers", "seed"]
    for path in _differing(records):
        values = [leaves(record["config"]).get(path) for record in records]
        # A setting that follows the seed, as ${seed} does, says nothing new.
        if not any([exact(row.get(c)) for row in rows] == [exact(v) for v in values] for c in asked):
            asked.insert(-1, path)
            for row, value in zip(rows, values, strict=True):
                row[path] = value
    measured = list(dict.fromkeys(key for row in rows for key in row if key not in asked and key != "id"))
    table = Table(["id", *asked], sorted(measured, key=_place(corpora)), rows)
    if sort is not None and sort not in table.columns:
        raise Mistake(f"no column {sort!r} to sort by; there is {', '.join(table.columns)}")
    order = ["model", "pattern", *asked, "id"] if sort is None else [sort]
    if sort == "kept":  # each metric has a score of its own
        rows.sort(key=lambda row: [natural(scored_by(row, table)), natural(row.get("kept"))])
    else:
        rows.sort(key=lambda row: [natural(row.get(column)) for column in order])
    return table


def check_corpus(records: Sequence[Record], corpus: str | None) -> None:
    """Raises Mistake for a corpus that no run was measured on."""
    corpora = keys(records, "quality")
    if corpus is not None and corpus not in corpora:
        raise Mistake(f"no run was measured on {corpus!r}; there is {', '.join(corpora) or 'nothing'}")


def _asked(record: Record) -> dict[str, Any]:
    config = record["config"]
    return {
        "id": record["id"],
        **{group: option for group, option in _choices(record).items() if group not in MEASURING},
        "model": record["model"]["name"],
        "pattern": record["sparsity"]["pattern"],
        "outliers": config.get("outliers"),
        "seed": config.get("seed"),
    }


def _choices(record: Record) -> dict[str, str]:
    """The option chosen in each group; its class if a record does not name the option."""
    config = record["config"]
    classes = {g: config[g]["_class"] for g in FRONT if at(config, f"{g}._class") is not None}
    return classes | (config.get("choices") or {})


def _common_tasks(records: Sequence[Record]) -> list[str]:
    """The tasks that all runs with tasks have in common, with an accuracy: of others a mean says nothing."""
    with_tasks = [record["zeroshot"] for record in records if record.get("zeroshot")]

    def has(tasks: Record, task: str) -> bool:
        return task in tasks and tasks[task].get("score", "acc") in SHARES

    return [task for task in keys(records, "zeroshot") if all(has(tasks, task) for tasks in with_tasks)]


def _measured(record: Record, corpora: list[str], tasks: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"density": record["sparsity"]["density"]}
    for corpus in corpora:
        dense, pruned = (at(record, "quality").get(corpus, {}).get(which) for which in ("dense", "pruned"))
        row[f"{corpus} ppl dense"], row[f"{corpus} ppl pruned"] = dense, pruned
        row[f"{corpus} ratio"] = pruned / dense if dense and pruned is not None else None
    for task, value in record.get("zeroshot", {}).items():
        row[f"{task} dense"], row[f"{task} pruned"] = value["dense"], value["pruned"]
    if len(tasks) > 1 and record.get("zeroshot"):
        for which in ("dense", "pruned"):
            row[f"mean of tasks {which}"] = mean(record["zeroshot"][task][which] for task in tasks)
    layers, memory = record.get("layers", []), record.get("memory", {})
    row["bits"] = bits_per_weight(record)
    row["error"] = mean(layer.get("relative_error") for layer in layers)
    row["kept"] = mean(layer.get("kept_score") for layer in layers)
    row["seconds"] = record["seconds"]
    row["host MiB"], row["device MiB"] = memory.get("peak_host_mib"), memory.get("peak_device_mib")
    return row


def bits_per_weight(record: Record) -> float | None:
    """What a pruned weight takes with its share of index, scales and outliers, if some run was quantised.

    Values that are not rounded count 16 bits, whatever the run computed in: nobody keeps more.
    """
    memory, density = record.get("memory", {}), record["sparsity"]["density"]
    if memory.get("bits") is not None:
        bits: float = memory["bits_per_weight"]
        return bits
    metadata = memory.get("metadata_bits")
    if metadata is None:
        return None
    orders, weights = (
        memory.get("order_bytes") or 0,
        record["model"].get("pruned_parameters"),
    )  # older records lack them
    return 16 * density + float(metadata) + (8 * orders / weights if orders and weights else 0.0)


def profiles(records: Sequence[Record]) -> Table:
    """The profiles of all runs with one: a row per layer, input of a layer or attention head.

    Raises ValueError if no run has one.
    """
    rows = [
        {"id": record["id"], "model": record["model"]["name"], "pattern": record["sparsity"]["pattern"]} | row
        for record in records
        for row in (record.get("profile") or {}).get("rows", [])
    ]
    if not rows:
        raise Mistake("no run has a profile: run it with profile=true")
    asked = ["id", "model", "pattern", "kind", "name", "head"]
    measured = list(dict.fromkeys(key for row in rows for key in row if key not in (*asked, "values")))
    return Table([*asked, "values"], measured, rows, like=dict.fromkeys(measured, "share pruned"))


def _differing(records: Sequence[Record]) -> list[str]:
    """Settings that differ between two runs of the same choice, as paths like metric.alpha.

    Of `evaluate` and `zeroshot`, whose options have no column: between two runs that measured the same corpus or task.
    """
    seen: dict[str, dict[str, set[str]]] = {}
    for record in records:
        choices: dict[str, Iterable[str]] = {group: [option] for group, option in _choices(record).items()}
        choices |= {"model": [record["model"]["name"]]}
        choices |= {"evaluate": record["quality"], "zeroshot": record.get("zeroshot", {})}
        for path, value in (LATER | leaves(record["config"])).items():
            if path in HIDDEN:
                continue
            for chosen in choices.get(path.partition(".")[0], [""]):
                seen.setdefault(path, {}).setdefault(chosen, set()).add(exact(value))
    return [path for path, by_choice in seen.items() if max(map(len, by_choice.values())) > 1]


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that tell runs apart, by path: {"metric.alpha": 1.0}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path in HIDDEN or key.startswith("_") or asks_for_nothing(path, value):
            continue
        found |= leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def scored_by(row: dict[str, Any], table: Table) -> str:
    """Whose score a run kept a share of: its metric, with the settings of it in which runs of the table differ."""
    own = [c for c in table.asked if c.startswith("metric.") and row.get(c) is not None]
    return ", ".join([str(row.get("metric") or "-"), *(f"{c.removeprefix('metric.')}={text(c, row[c])}" for c in own)])


def _place(corpora: list[str]) -> Any:
    """Density, perplexities, tasks, then time and memory."""
    first = ["density", "bits", *[f"{c} {what}" for c in corpora for what in ("ppl dense", "ppl pruned", "ratio")]]
    last = ["error", "kept", "seconds", "host MiB", "device MiB"]
    places = {c: i for i, c in enumerate(first)} | {c: len(first) + 1 + i for i, c in enumerate(last)}
    return lambda column: places.get(column, len(first))


def means(table: Table) -> Table:
    """One row for the runs that differ only in their seeds: `Spread` values, and the number of runs."""
    asked = [c for c in table.asked if c not in ("id", "seed") and not c.endswith(".seed")]
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in table.rows:
        alike.setdefault(tuple(exact(row.get(c)) for c in asked), []).append(row)
    rows = []
    for runs in alike.values():
        values = {c: [run[c] for run in runs if run.get(c) is not None] for c in table.measured}
        same: dict[str, Any] = {c: runs[0].get(c) for c in asked} | {"runs": len(runs), IDS: ids_of(runs)}
        rows.append(same | {column: spread(of_runs) for column, of_runs in values.items()})
    return Table([*asked, "runs"], table.measured, rows)
