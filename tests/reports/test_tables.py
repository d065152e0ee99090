"""Tables of hand-made records, compared letter by letter."""

import copy
import json
import math
import subprocess
import sys

import pytest
from rich.console import Console

from esparse.reports import literature
from esparse.reports.command import csv, latex, main, markdown
from esparse.reports.figures.catalogue import plot
from esparse.reports.reading import read_records
from esparse.reports.tabulate import bits_per_weight, means, table_of
from esparse.reports.writing import runs_table
from tests import forks
from tests.workshop import ROOT

CHOICES = {"model": "tiny", "calibration": "builtin", "shuffle": "none", "update": "none", "recovery": "none"}


def record(run="a1", *, metric="wanda", pattern="2:4", seed=0, pruned=15.0, dense=10.0, **settings):
    """A record in which every number can be told by eye; settings belong to the metric."""
    return {
        "id": run,
        "name": "tiny",
        "status": "finished",
        "seconds": 2.5,
        "config": {
            "model": {"name": "tiny", "path": "builtin", "devices": run},
            "metric": {"_class": metric.title(), **settings},
            "calibration": {"seed": seed, "sequences": 8},
            "pattern": pattern,
            "seed": seed,
            "output_root": f"somewhere/{run}",
            "tracking": {"mode": run},
            "choices": {**CHOICES, "metric": metric, "evaluate": "builtin", "tracking": "wandb"},
        },
        "model": {"name": "tiny"},
        "sparsity": {"pattern": pattern, "density": 0.5, "pattern_holds": True},
        "quality": {"builtin": {"dense": dense, "pruned": pruned, "tokens": 10, "sequence_length": 5}},
        "layers": [{"relative_error": 0.25, "kept_score": 0.75}, {"relative_error": None, "kept_score": 0.5}],
        "memory": {"peak_host_mib": 100.4, "peak_device_mib": None},
    }


def write(root, *records):
    for one in records:
        folder = root / one["id"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(one))


def command(*arguments):
    done = forks.run("-m", "esparse.tables", *arguments)
    return done.returncode, done.stdout, done.stderr


TWO = [record("b2", pruned=15.0), record("a1", metric="entropy", pruned=12.5, alpha=1.0)]

MARKDOWN = """\
All runs: model tiny, shuffle none, update none, recovery none, calibration builtin, pattern 2:4, seed 0, \
density 0.5, builtin ppl dense 10.00

| id  | metric  | builtin ppl pruned | builtin ratio |  error |   kept | seconds | host MiB |
| --- | ------- | -----------------: | ------------: | -----: | -----: | ------: | -------: |
| a1  | entropy |              12.50 |         1.250 | 0.2500 | 0.6250 |     2.5 |      100 |
| b2  | wanda   |              15.00 |         1.500 | 0.2500 | 0.6250 |     2.5 |      100 |
"""

CSV = """\
id,model,metric,shuffle,update,recovery,calibration,pattern,seed,density,builtin ppl dense,\
builtin ppl pruned,builtin ratio,error,kept,seconds,host MiB
a1,tiny,entropy,none,none,none,builtin,2:4,0,0.5,10.0,12.5,1.25,0.25,0.625,2.5,100.4
b2,tiny,wanda,none,none,none,builtin,2:4,0,0.5,10.0,15.0,1.5,0.25,0.625,2.5,100.4
"""


def test_markdown_says_what_is_shared_once_and_the_rest_in_columns():
    assert markdown(TWO) == MARKDOWN


def test_csv_keeps_every_column_and_digit():
    assert csv(TWO) == CSV


def test_latex_escapes_what_latex_would_read():
    runs = [record("[a<1]", pattern="50%"), record("b_2", pattern="60%")]
    lines = latex(runs, columns=["id", "pattern", "builtin ppl pruned"]).splitlines()
    assert lines[:2] == [r"% needs \usepackage{booktabs}", lines[1]] and lines[1].startswith("% All runs: model tiny, ")
    assert lines[2:5] == [r"\begin{tabular}{llr}", r"\toprule", r"id & pattern & builtin ppl pruned \\"]
    assert lines[6] == r"{}[a$<$1] & 50\% & 15.00 \\"  # \\[ would be a distance
    assert lines[7:] == [r"b\_2 & 60\% & 15.00 \\", r"\bottomrule", r"\end{tabular}"]


def test_latex_of_a_turned_table_by_hand():
    runs = [record(str(seed), seed=seed, pruned=pruned) for seed, pruned in enumerate([1.0, 29.0])]
    runs += [record("2", metric="ria", pruned=12.0), record("3", metric="ria", seed=1, pruned=15.0)]
    runs += [record("4", metric="entropy", pruned=13.0), record("5", metric="entropy", pattern="4:8", pruned=9.0)]
    runs += [record("6", metric="entropy", pattern="4:8", pruned=9.5)]
    runs[-1]["config"]["choices"]["update"] = "obs"
    lines = latex(runs, across=["pattern", "update"], best=True).splitlines()
    assert lines[2:] == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r" & 2:4 & \multicolumn{2}{c}{4:8} \\".replace("2:4", r"\multicolumn{1}{c}{2:4}"),
        r"\cmidrule(lr){2-2} \cmidrule(lr){3-4}",
        r"metric & none & none & obs \\",
        r"\midrule",
        r"entropy & \textbf{13.00}\phantom{ $\pm$ 19.80} & \textbf{9.00} & 9.50 \\",
        r"ria & 13.50 $\pm$ \phantom{0}2.12 &  &  \\",
        r"wanda & 15.00 $\pm$ 19.80 &  &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_best_is_of_one_model_pattern_and_measurement():
    runs = [
        record("a", pruned=12.004),
        record("b", pruned=12.001),
        record("c", pruned=12.5),
        record("d", pattern="4:8", pruned=20.0),
        record("e", pattern="4:8", pruned=math.nan),
        record("f", pattern="8:16", pruned=7.0),
        record("g", pattern="8:16", pruned=7.0),
    ]
    for run, accuracy in zip(runs, [0.5, 0.75, 0.25, 0.5, 0.25, None, 0.5], strict=True):
        run["zeroshot"] = {"arc": {"dense": 0.75, "pruned": accuracy, "stderr": 0.1, "n": 8}}
        run["layers"] = []
    table = table_of(runs)
    best = {(table.rows[i]["id"], column) for i, column in table.best()}
    # Alike as they are written: a and b. Alone in its pattern: f, d's perplexity. All alike: those of f and g.
    expected = {(run, f"builtin {what}") for run, what in [("a", "ppl pruned"), ("b", "ppl pruned")]}
    assert best == expected | {("a", "builtin ratio"), ("b", "builtin ratio"), ("b", "arc pruned"), ("d", "arc pruned")}
    shown = markdown(runs, best=True, columns=["id", "builtin ppl pruned", "arc pruned"])
    assert "| a   |          **12.00** |     0.5000 |" in shown and "| b   |          **12.00** | **0.7500** |" in shown


def test_columns_are_those_that_were_asked_for(tmp_path):
    chosen = ["builtin ppl dense", "metric"]
    lines = markdown(TWO, columns=chosen).splitlines()
    assert lines[0].endswith("seed 0, density 0.5")  # what is asked for stays in the table
    assert lines[2:4] == ["| builtin ppl dense | metric  |", "| ----------------: | ------- |"]
    assert [line.strip("| ").split(" | ") for line in lines[4:]] == [["10.00", "entropy"], ["10.00", "wanda"]]
    assert csv(TWO, columns=chosen) == "builtin ppl dense,metric\n10.0,entropy\n10.0,wanda\n"
    write(tmp_path, *TWO)
    code, _, err = command(tmp_path, "--columns", "metric,colour")
    assert code == 2 and err.startswith("esparse: no column 'colour' to show; there is id, model, metric")
    code, _, err = command(tmp_path, "--best", "--format", "csv")
    assert (code, err) == (2, "esparse: --best sets cells in bold, which csv does not have\n")
    assert (
        '<td class="number" data-value="12.5"><b>12.50</b></td>' in command(tmp_path, "--best", "--format", "html")[1]
    )


def test_one_run_keeps_its_numbers_in_the_table():
    line, _, header, *_ = markdown([record()]).splitlines()
    assert line.startswith("Run: model tiny, metric wanda") and "ppl" not in line
    assert header.startswith("| id  | density | builtin ppl dense | builtin ppl pruned |")


def test_a_setting_that_differs_within_a_choice_becomes_a_column():
    swept = [
        record("a", metric="entropy", alpha=0.5),
        record("b", metric="entropy", alpha=1.0),
        record("c", bins=3),
    ]
    table = table_of(swept)
    assert table.asked[-2:] == ["metric.alpha", "seed"]
    assert [(row["id"], row.get("metric.alpha")) for row in table.rows] == [
        ("a", 0.5),
        ("b", 1.0),
        ("c", None),
    ]
    header = markdown(swept).splitlines()[2]
    assert "metric.alpha" in header and "bins" not in header


@pytest.mark.parametrize(
    "other",
    [
        record("b", metric="entropy", alpha=1.0),  # follows from the metric
        record("b", seed=1),  # calibration.seed is the seed
        record("b"),  # output_root, tracking and model.devices: where it ran
    ],
)
def test_what_follows_from_a_choice_or_changes_nothing_is_no_column(other):
    columns = table_of([record("a", alpha=0.5), other]).columns
    assert [column for column in columns if "." in column] == []


def measured(run, group, option, **settings):
    """A record that measured a corpus or task as an option of `evaluate` or `zeroshot` has it."""
    one = record(run) | {"zeroshot": {"piqa": {"dense": 0.75, "pruned": 0.5, "stderr": 0.01, "n": 4}}}
    one["config"] = one["config"] | {group: settings, "choices": one["config"]["choices"] | {group: option}}
    return one


@pytest.mark.parametrize(
    ("group", "setting"), [("evaluate", "max_tokens"), ("evaluate", "length"), ("zeroshot", "limit")]
)
def test_what_was_measured_otherwise_stands_apart_whatever_the_option(group, setting):
    # options of these groups have no column that would tell the runs apart
    runs = [measured("a", group, "builtin", **{setting: 8, "tasks": []}), measured("b", group, "paper", tasks=["piqa"])]
    if group == "zeroshot":
        runs[0]["config"]["zeroshot"]["tasks"] = ["piqa"]
    runs[1]["config"][group][setting] = None
    assert f"{group}.{setting}" in table_of(runs).asked
    assert len(means(table_of(runs)).rows) == 2
    runs[1]["quality"] = {"c4": runs[1]["quality"]["builtin"]}
    runs[1]["zeroshot"] = {}
    assert f"{group}.{setting}" not in table_of(runs).asked


def test_a_setting_that_an_older_record_lacks_is_no_difference():
    assert "metric.alpha" not in table_of([record("a"), record("b", alpha=1.0)]).columns


@pytest.mark.parametrize("without", [{"foldable": False}, {}])  # {}: from before esparse had the setting
def test_a_setting_that_asks_for_nothing_differs_from_one_that_does(without):
    plain, folded = record("a"), record("b")
    plain["config"]["shuffle"], folded["config"]["shuffle"] = without, {"foldable": True}
    table = table_of([plain, folded])
    assert [row.get("shuffle.foldable") for row in table.rows] == [True, None]
    assert len(means(table).rows) == 2


def test_a_column_of_another_group_appears_with_its_option():
    other = record("b")
    other["config"]["choices"]["calibration"] = "text"
    other["config"]["calibration"]["path"] = "x.txt"
    header = markdown([record("a"), other]).splitlines()[2]
    assert header.startswith("| id  | calibration | builtin ppl")


def test_outliers_and_tasks_have_columns_where_some_run_has_them():
    other = record("b")
    other["config"]["outliers"] = "16:256"
    other["zeroshot"] = {"arc": {"dense": 0.5, "pruned": 0.375, "stderr": 0.01, "n": 100}}
    lines = markdown([record("a"), other], sort="id").splitlines()
    assert lines[2].startswith("| id  | outliers | builtin ppl pruned | builtin ratio | arc dense | arc pruned |")
    assert lines[4].startswith("| a   |          |              15.00 |         1.500 |           |            |")
    assert lines[5].startswith("| b   | 16:256   |              15.00 |         1.500 |    0.5000 |     0.3750 |")


def test_the_mean_over_tasks_is_over_those_that_all_runs_have():
    def with_tasks(run, **scores):
        tasks = {task: {"dense": 0.5, "pruned": pruned, "stderr": 0.1, "n": 8} for task, pruned in scores.items()}
        return record(run, metric=run) | {"zeroshot": tasks}

    runs = [with_tasks("a", arc=0.25, piqa=0.5, sciq=0.75), with_tasks("b", piqa=0.25, sciq=0.125), record("c")]
    table = table_of(runs)
    assert [row.get("mean of tasks pruned") for row in table.rows] == [0.625, 0.1875, None]
    assert table.columns.index("mean of tasks pruned") > table.columns.index("sciq pruned")
    assert "0.6250" in markdown(runs).splitlines()[4] and "mean of tasks pruned" in csv(runs).splitlines()[0]
    runs[0]["zeroshot"]["piqa"]["score"] = "word_perplexity"  # of which there is no mean
    assert "mean of tasks pruned" not in table_of(runs).columns


def test_rows_are_sorted_by_pattern_as_numbers_or_by_a_column():
    runs = [
        record("a", pattern="16:32", pruned=3),
        record("b", pattern="2:4", pruned=2),
        record("c", pruned=1),
    ]
    assert [row["id"] for row in table_of(runs).rows] == ["b", "c", "a"]
    assert [row["id"] for row in table_of(runs, sort="builtin ppl pruned").rows] == ["c", "b", "a"]
    with pytest.raises(ValueError, match=r"no column 'ppl' to sort by; there is id, model, .*builtin ppl pruned"):
        table_of(runs, sort="ppl")


def test_one_corpus_can_be_asked_for():
    both = record()
    both["quality"]["c4"] = {"dense": 1.0, "pruned": 2.0}
    assert [c for c in table_of([both], corpus="c4").columns if "ppl" in c] == ["c4 ppl dense", "c4 ppl pruned"]
    with pytest.raises(ValueError, match="no run was measured on 'x'; there is builtin, c4"):
        table_of([both], corpus="x")


def test_mean_over_seeds_by_hand():
    runs = [record(str(seed), seed=seed, pruned=pruned) for seed, pruned in enumerate([12.0, 14.0, 16.0])]
    runs.append(record("3", metric="entropy", alpha=1.0, pruned=11.0))
    entropy, wanda = means(table_of(runs)).rows
    assert (wanda["runs"], wanda["builtin ppl pruned"].mean) == (3, 14.0)
    assert wanda["builtin ppl pruned"].deviation == pytest.approx(2.0)  # sqrt((4 + 0 + 4) / 2)
    assert (entropy["runs"], entropy["builtin ppl pruned"].deviation) == (1, None)
    lines = markdown(runs, mean=True).splitlines()
    assert lines[2].startswith("| metric  | runs | builtin ppl pruned | builtin ratio |")
    assert lines[4].startswith("| entropy |    1 |              11.00 |         1.100 |")
    assert lines[5].startswith("| wanda   |    3 |       14.00 ± 2.00 | 1.400 ± 0.200 |")
    assert markdown(runs, mean=True, sort="runs").splitlines()[4].startswith("| entropy")
    rows = csv(runs, mean=True).splitlines()
    assert "runs,density,density std," in rows[0] and "builtin ppl pruned,builtin ppl pruned std" in rows[0]
    assert ",14.0,2.0," in rows[2] and ",11.0,," in rows[1]


def test_a_group_that_came_later_did_nothing_to_older_runs() -> None:
    older, newer = record("a1"), record("b2")
    newer["config"]["choices"]["quantise"] = "none"
    older["config"]["choices"].pop("quantise", None)
    assert [row["quantise"] for row in table_of([older, newer]).rows] == ["none", "none"]
    assert "quantise" not in table_of([older]).rows[0]


def test_a_turned_table_by_hand():
    runs = [record(str(seed), seed=seed, pruned=pruned) for seed, pruned in enumerate([12.0, 14.0])]
    runs += [record("2", pattern="16:32", pruned=11.0), record("3", pattern="16:32", metric="entropy", pruned=12.5)]
    turned = markdown(runs, across=["pattern"]).splitlines()
    assert turned[0] == "All runs: model tiny, shuffle none, update none, recovery none, calibration builtin"
    assert [line.replace(" ", "") for line in turned[2:4]] == ["|metric|2:4|16:32|", "|-------|-----------:|----:|"]
    assert sorted(turned[4:]) == ["| entropy |              | 12.50 |", "| wanda   | 13.00 ± 1.41 | 11.00 |"]
    errors = markdown(runs, across=["pattern", "metric"], value="error").splitlines()
    assert "| 2:4, wanda | 16:32, entropy | 16:32, wanda |" in errors[2]
    assert errors[4].replace(" ", "").endswith("|0.2500|0.2500|0.2500|")
    assert csv(runs, mean=True, across=["pattern"]).splitlines()[0].endswith("2:4,2:4 std,16:32,16:32 std")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"across": ["colour"]}, "no column 'colour'; there is model, metric"),
        ({"across": ["metric"], "value": "weight"}, "no column 'weight'; there is density"),
        ({"pairs": "colour"}, "no column 'colour'; there is model, metric"),
        ({"pairs": "pattern"}, "no two runs with a 'builtin ppl pruned' differ in 'pattern' alone"),
        ({"value": "error"}, "say by which columns, --across or --pairs"),
    ],
)
def test_a_table_that_cannot_be_turned(asked, words):
    with pytest.raises(ValueError, match=words):
        markdown(TWO, **asked)


def test_pairs_by_hand():
    runs = [record("1", pruned=12.0), record("2", pruned=11.0, seed=1), record("3", pruned=9.0, pattern="4:8")]
    runs += [record("4", metric="entropy", pruned=11.5, alpha=1.0), record("5", metric="ria", pruned=12.0, seed=1)]
    runs += [record("6", metric="entropy", pruned=11.0, alpha=2.0), record("7", metric="ria", pruned=12.5)]
    runs += [record("8", metric="none", pruned=20.0), record("9", metric="none", pruned=None, seed=1)]
    lines = [line.replace(" ", "") for line in markdown(runs, pairs="metric").splitlines()]
    assert lines == [
        "|metric|against|pairs|lower|higher|difference|least|greatest|",
        "|---------------|---------------|----:|----:|-----:|----------:|----:|-------:|",
        "|entropyalpha=1|entropyalpha=2|1|0|1|0.50|0.50|0.50|",
        "|entropyalpha=1|ria|1|1|0|-1.00|-1.00|-1.00|",
        "|entropyalpha=1|wanda|1|1|0|-0.50|-0.50|-0.50|",
        "|entropyalpha=1|none|1|1|0|-8.50|-8.50|-8.50|",
        "|entropyalpha=2|ria|1|1|0|-1.50|-1.50|-1.50|",
        "|entropyalpha=2|wanda|1|1|0|-1.00|-1.00|-1.00|",
        "|entropyalpha=2|none|1|1|0|-9.00|-9.00|-9.00|",
        "|ria|wanda|2|0|2|0.75±0.35|0.50|1.00|",
        "|ria|none|1|1|0|-7.50|-7.50|-7.50|",
        "|wanda|none|1|1|0|-8.00|-8.00|-8.00|",
    ]
    written = csv(runs, pairs="metric").splitlines()
    assert written[0] == "metric,against,pairs,lower,higher,difference,difference std,least,greatest"
    assert written[8].startswith("ria,wanda,2,0,2,0.75,0.35355")


def test_pairs_for_each_value_of_another_column():
    runs = [
        record(f"{s}{m}{p}", seed=s, metric=m, pattern=p, pruned=len(m) + s)
        for s in (0, 1)
        for m in ("wanda", "ria")
        for p in ("4:8", "2:4")
    ]
    lines = markdown(runs, pairs="metric", across=["pattern"], value="builtin ratio").splitlines()[2:]
    assert [line.replace(" ", "") for line in lines] == [
        "|2:4|ria|wanda|2|2|0|-0.200|-0.200|-0.200|",
        "|4:8|ria|wanda|2|2|0|-0.200|-0.200|-0.200|",
    ]


def test_outliers_are_paired_apart_from_the_pattern_that_they_are_beside():
    runs = []
    for k, (base, outliers) in enumerate([("4:8", None), ("8:16", None), ("8:16", "4:32"), ("4:8", "4:32")]):
        runs.append(record(str(k), pattern=f"{base}+{outliers}" if outliers else base, pruned=12.0 + k))
        runs[-1]["config"]["outliers"] = outliers

    def compared(column):
        lines = markdown(runs, pairs=column).splitlines()[2:]
        return [line.replace(" ", "") for line in lines]

    assert compared("outliers") == ["|4:32|-|2|0|2|2.00±1.41|1.00|3.00|"]
    assert compared("pattern") == ["|4:8|8:16|2|1|1|0.00±1.41|-1.00|1.00|"]


def test_numbers_that_are_not_finite_or_not_there_are_shown_as_they_are():
    runs = [record("a", pruned=math.inf), record("b", pruned=None), record("c", pruned=123456.7)]
    rows = [line.split("|") for line in markdown(runs, sort="id").splitlines()[4:]]
    assert [(row[2].strip(), row[3].strip()) for row in rows] == [
        ("inf", "inf"),
        ("", ""),
        ("123457", "12345.7"),
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((("name",), None), (("config", "model"), None), (("config", "outliers"), -1), (("config", "choices"), [])),
        *((("config", "quantise"), None), (("config", "zeroshot"), None), (("config", "zeroshot"), {})),
        (("config", "zeroshot"), 3),
    ],
)
def test_a_damaged_setting_is_named_and_the_rest_is_read(path, value, tmp_path, capsys):
    damaged = record("damaged")
    at = damaged if len(path) == 1 else damaged["config"]
    at[path[-1]] = value
    write(tmp_path, record("good"), damaged)
    assert markdown(read_records(tmp_path)) and literature.main([str(tmp_path)]) == 1  # none is of what was published
    said = capsys.readouterr().err
    assert f"{tmp_path / 'damaged' / 'result.json'} is left out: its field {'.'.join(path)} is" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("environment", "x"), ("export", 4), ("latency", "x"), ("latency.0", 1), ("layers.0.name", 1)),
        *(("memory.peak_device_mib", {"a": 1}), ("profile.thresholds", 1)),
        *(("memory.peak_host_mib", "much"), ("model.parameters", "many"), ("profile", [1]), ("resumed", 1)),
        *(("config.choices.metric", ["x"]), ("config.evaluate.max_tokens", "x"), ("config.zeroshot.limit", "x")),
        *(
            ("latency.0.dense_ms", "x"),
            ("latency.0.kernel", 1),
            ("memory.metadata_bits", {}),
            ("zeroshot.boolq.n", "x"),
        ),
        *(("quality.builtin.tokens", None), ("quality.builtin.sequence_length", "x")),
        *(("seconds_by_stage", 7), ("seconds_by_stage.score", "x"), ("zeroshot.boolq.stderr", "x")),
    ],
)
def test_a_field_of_another_kind_is_named_and_the_rest_is_read(field, value, tmp_path, capsys):
    damaged = record("damaged")
    place, *inside = field.split(".")
    if place == "config":
        damaged["config"] |= {"zeroshot": {"tasks": []}, "evaluate": {}}
        damaged["config"][inside[0]][inside[1]] = value
    else:
        for key in reversed(inside):
            value = [value] if key == "0" else {key: value}
        damaged[place] = damaged[place] | value if place == "model" else value
    write(tmp_path, record("good"), damaged)
    assert [one["id"] for one in read_records(tmp_path)] == ["good"]
    assert f"result.json is left out: its field {field} is not what it should be" in capsys.readouterr().err


MISSING = "missing or not what it should be"


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("seconds", 10**400, "it holds a number of 401 digits"),
        ("seed", -(10**400), "it holds a number of 402 digits"),
        ("memory", {"bits": {"values": 4}}, "its field memory.bits_per_weight is missing, and it has memory.bits"),
        ("profile", {"rows": []}, "its field profile.thresholds is missing, and it has profile.rows"),
        ("profile", {}, "its field profile.rows is missing, and it has profile"),
        *(
            ("profile", {"rows": [row], "thresholds": [0.1]}, f"its field profile.rows.0.{field} is {MISSING}")
            for field, row in (
                ("dense 0.1", {"kind": "weight", "name": "q", "pruned 0.1": 0.5}),
                ("pruned 0.1", {"kind": "weight", "name": "q", "dense 0.1": 0.5, "pruned 0.1": None}),
                ("name", {"kind": "weight", "dense 0.1": 0.5, "pruned 0.1": 0.5}),
            )
        ),
    ],
)
def test_a_record_that_no_table_can_show_is_named(field, value, why, tmp_path, capsys):
    write(tmp_path, record("good"), record("odd") | {field: value})
    assert [one["id"] for one in read_records(tmp_path)] == ["good"]
    assert capsys.readouterr().err == f"esparse: {tmp_path / 'odd' / 'result.json'} is left out: {why}\n"


def test_a_record_of_no_pruned_weights_has_bits_too():
    run = record() | {"model": {"name": "tiny", "pruned_parameters": 0}}
    run["memory"] |= {"metadata_bits": 0.75, "order_bytes": 8}
    assert bits_per_weight(run) == 8.75


def test_a_name_of_several_lines_is_one_cell():
    runs = [record("a") | {"model": {"name": "my\nmodel"}}, record("b") | {"model": {"name": "tiny"}}]
    assert "| my model |" in markdown(runs) and "my model & " in latex(runs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pairs", "seed", "--mean"], "--mean would change nothing in the table of --pairs: leave it out"),
        (
            ["--latency", "--across", "seed", "--best"],
            "--across and --best would change nothing in the table of --latenc",
        ),
        (["--profile", "--sort", "seed"], "--sort would change nothing in the table of --profile"),
        (["--out", "x.png", "--mean", "--columns", "seed"], "--mean and --columns would change nothing in a picture"),
        (["--layer", "q_proj"], "--layer chooses what --plot channels shows"),
        (["--columns", "metric,"], "--columns needs the name of a column, got 'metric,'"),
        (["--across", "seed"], "--across seed: the cells of a turned table are means over seeds"),
        (["--across", "metric,pattern,metric"], "--across names metric twice: once is enough"),
        (["--columns", "id,id"], "--columns names id twice"),
        (["--pairs", ""], "--pairs needs the name of a column, got ''"),
        (["--corpus", ""], "--corpus needs the name of a corpus"),
        (["--out", "x.png", "--plot", "kept", "--corpus", "c5"], "no run was measured on 'c5'; there is builtin"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, record("a"), record("b", seed=1))
    assert main([str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_columns_may_have_spaces_behind_their_commas(tmp_path, capsys):
    write(tmp_path, record("a"), record("b", seed=1))
    assert main([str(tmp_path), "--columns", "id, seed"]) == 0
    assert "| id  | seed |" in capsys.readouterr().out


def test_a_task_without_a_score_leaves_its_place_in_the_picture_empty(tmp_path):
    without = record("without") | {"zeroshot": {"boolq": {"dense": 0.5, "pruned": None}}}
    plot(
        [without, record("with") | {"zeroshot": {"boolq": {"dense": 0.5, "pruned": 0.4}}}],
        tmp_path / "x.svg",
        name="tasks",
    )
    assert (tmp_path / "x.svg").exists()


def test_runs_may_be_gathered_by_links(tmp_path):
    write(tmp_path / "one", record("a1"))
    write(tmp_path / "two", record("b2"))
    (tmp_path / "both").mkdir()
    for folder in ("one/a1", "two/b2"):
        (tmp_path / "both" / folder[4:]).symlink_to(tmp_path / folder)
    assert [r["id"] for r in read_records(tmp_path / "both")] == ["a1", "b2"]
    assert len(read_records(tmp_path / "one")) == 1


def test_a_copy_of_a_run_counts_once(tmp_path, capsys):
    write(tmp_path, record("a1", pruned=14.0), record("b2", seed=1, pruned=16.0))
    write(tmp_path / "backup", record("b2", seed=1, pruned=16.0))
    assert len(read_records(tmp_path)) == 2
    one, again = (tmp_path / place / "result.json" for place in ("b2", "backup/b2"))
    assert f"{again} is left out: it is {one} once more" in capsys.readouterr().err


def test_a_run_that_was_carried_out_twice_is_named(tmp_path, capsys):
    files = [tmp_path / place / "a" / "result.json" for place in ("two", "one")]
    write(tmp_path / "one", record("a"))
    write(tmp_path / "two", record("a", pruned=15.5), record("b"))
    assert [r["id"] for r in read_records(tmp_path)] == ["a", "a", "b"]
    said = "esparse: {} is the run of {}, carried out again{}: a mean counts each\n"
    assert capsys.readouterr().err == said.format(*files, "")
    write(tmp_path / "two more", record("b", pruned=16.0))
    assert len(read_records(tmp_path)) == 4
    assert capsys.readouterr().err == said.format(*files, "; 1 more are so")


def test_damaged_records_are_named_and_the_rest_is_read(tmp_path, capsys):
    write(tmp_path, record("good"))
    without = copy.deepcopy(record("without"))
    del without["sparsity"]["density"]
    wrong = copy.deepcopy(record("wrong"))
    wrong["quality"]["builtin"]["pruned"] = "low"
    write(tmp_path, without, wrong, record("running") | {"status": "running"})
    for name, content in [("cut", json.dumps(record())[:99]), ("list", "[]"), ("bytes", None), ("deep", "[" * 100_000)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes(b"\xff\xfe" if content is None else content.encode())
    assert [one["id"] for one in read_records(tmp_path)] == ["good"]
    said = capsys.readouterr().err.splitlines()
    expected = {
        "bytes": "it is not whole JSON",
        "cut": "it is not whole JSON",
        "deep": "it is not whole JSON",
        "list": "it is not a record",
        "running": "its status is 'running'",
        "without": "its field sparsity.density is missing or not what it should be",
        "wrong": "its field quality.builtin.pruned is missing or not a number",
    }
    assert said == [f"esparse: {tmp_path / n / 'result.json'} is left out: {why}" for n, why in expected.items()]


def shown(table, width=120):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_terminal_table_shows_runs_and_below_them_those_without_a_record():
    missing = [("not finished", "tiny 2:4 ria", "running on n1"), ("failed", "tiny 3:7 [wanda]", "width 130")]
    lines = shown(runs_table(TWO, missing)).splitlines()
    lines = [line.rstrip() for line in lines if line.strip()]
    assert lines[0].startswith("All runs: model tiny, shuffle none")
    assert any(line.split()[:4] == ["a1", "entropy", "12.50", "1.250"] for line in lines)
    assert lines[-2:] == ["not finished: tiny 2:4 ria: running on n1", "failed: tiny 3:7 [wanda]: width 130"]
    assert "failed: width 130" in shown(runs_table([], [("failed", "tiny 3:7", "width 130")]))


def test_terminal_table_never_breaks_a_number():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    runs = [record(f"0000000{i}", metric=m, pruned=912.25, seed=i) for i in (1, 2) for m in ("wanda", "entropy")]
    console.print(runs_table(runs))
    printed = console.export_text()
    assert printed.count("912.25") == 4 and printed.count("00000001") == 2


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_is_a_picture_even_of_what_is_not_finite(tmp_path, ending):
    runs = [record(m + p, metric=m, pattern=p, pruned=v) for m, p, v in [("wanda", "2:4", 15), ("wanda", "4:8", 12)]]
    runs += [record("x", metric="magnitude", pruned=900.0), record("y", metric="random", pruned=math.inf)]
    plot(runs, tmp_path / f"a.{ending}")
    content = (tmp_path / f"a.{ending}").read_bytes()
    assert content.startswith(b"\x89PNG") if ending == "png" else b"<svg" in content
    with pytest.raises(ValueError, match=r"written as \.png, \.svg, \.pdf, not as 'a\.docx'"):
        plot(runs, tmp_path / "a.docx")


def test_command_writes_what_the_functions_say(tmp_path):
    write(tmp_path / "runs", *TWO)
    (tmp_path / "runs" / "b2" / "deeper").mkdir()
    (tmp_path / "runs" / "b2" / "deeper" / "result.json").write_text("{")
    code, out, err = command(tmp_path / "runs")
    assert (code, out) == (0, MARKDOWN) and "deeper/result.json is left out" in err
    table, picture = tmp_path / "t.csv", tmp_path / "t.png"
    assert command(tmp_path / "runs", "--out", table)[:2] == (0, f"{table}: a table of 2 runs\n")
    assert (tmp_path / "t.csv").read_text() == CSV
    assert command(tmp_path / "runs", "--out", picture)[:2] == (0, f"{picture}: a picture of 2 runs\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_seeds_of_a_broken_model_have_a_mean():
    """The perplexity of a model that computes nonsense is e^700 at most: 1e304, whose square no float holds."""
    runs = [record("a1", pruned=math.exp(700)), record("a2", pruned=math.exp(699), seed=1)]
    assert "6.94e+303 ± 4.53e+303" in markdown(runs, mean=True)


@pytest.mark.parametrize("name", ["profile", "tasks", "errors", "bits", "latency", "perplexity"])
def test_a_picture_says_of_how_many_runs_it_is(tmp_path, name):
    share = {f"{which} {threshold}": 0.5 for which in ("dense", "pruned") for threshold in (0, 0.001, 0.01, 0.1)}
    rows = [{"kind": "weight", "name": "model.layers.0.q", "head": None, "values": 4} | share]
    timed = {"layer": "q", "tokens": 1, "n": 8, "k": 8, "dense_ms": 0.5, "sparse_ms": 0.25, "kernel": "packed"}
    more = record("c3") | {
        "profile": {"rows": rows, "thresholds": [0, 0.001, 0.01, 0.1]},
        "zeroshot": {"piqa": {"dense": 0.5, "pruned": 0.25, "n": 4}},
        "latency": [timed],
    }
    more["memory"] = {"bits": {"values": 4}, "bits_per_weight": 3.0}
    bare = [one | {"layers": [], "quality": {}} for one in TWO]
    write(tmp_path, *bare, more)
    picture = tmp_path / "a.png"
    assert command(tmp_path, "--plot", name, "--out", picture)[1] == f"{picture}: a picture of 1 of 3 runs\n"


LATENCY = [
    {"layer": "q", "tokens": 1, "dtype": "float16", "kernel": "packed", "dense_ms": 0.5, "sparse_ms": 0.25}
    | {"speedup": 2.0, "limit_speedup": 1.777, "share_of_limit": 0.505, "why_not": None},
    {"layer": "q", "tokens": 1, "dtype": "float16", "kernel": "cutlass", "dense_ms": 0.5, "sparse_ms": None}
    | {"speedup": None, "why_not": "wrong: relative error 1"},
    {"layer": "model", "phase": "decode", "sequences": 8, "tokens": 8, "kernel": "gemv", "dense_ms": 20.0}
    | {"sparse_ms": 40.0, "speedup": 0.5},
]


def test_latencies_have_a_table_of_their_own(tmp_path):
    write(tmp_path, record("b2") | {"latency": LATENCY}, record("a1"))
    code, out, _ = command(tmp_path, "--latency")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert code == 0
    header = ["run", "layer", "tokens", "dtype", "kernel", "dense ms", "sparse ms", "speed-up", "at most"]
    assert rows[0] == [*header, "share of limit"]
    assert [row[1:] for row in rows[2:]] == [
        ["q", "1", "float16", "packed", "0.5", "0.25", "2.00", "1.78", "50%"],
        ["q", "1", "float16", "cutlass", "0.5", "wrong: relative error 1", "", "", ""],
        ["decode, 8 sequences", "8", "", "gemv", "20", "40", "0.50", "", ""],
    ]
    assert all(row[0].startswith("b2") for row in rows[2:])
    assert command(tmp_path, "--latency", "--format", "csv")[0] == 2
    write(tmp_path / "none", record("c3"))
    assert "ran without bench" in command(tmp_path / "none", "--latency")[2]


def test_a_reader_that_has_enough_is_no_mistake(tmp_path):
    write(tmp_path, *TWO)
    for out, ends in [("| true", (0, "")), ("> /dev/full", (1, "esparse: cannot write the table: No space left"))]:
        line = f"{sys.executable} -m esparse.tables {tmp_path} {out}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == ends[0] and done.stderr.startswith(ends[1]), done.stderr


def test_command_ends_in_one_sentence_and_a_code(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    write(tmp_path / "runs", *TWO)
    for code, arguments, sentence in [
        (1, [empty], f"no run has finished in {empty} (looked for result.json)"),
        (2, [tmp_path / "nowhere"], f"{tmp_path / 'nowhere'} is not a folder"),
        (2, [tmp_path / "runs", "--format", "png"], "a plot needs a file: --out plot.png"),
        (2, [tmp_path / "runs", "--corpus", "c4"], "no run was measured on 'c4'; there is builtin"),
        (1, [tmp_path / "runs", "--out", empty], f"cannot write {empty}: Is a directory"),
    ]:
        assert command(*arguments) == (code, "", f"esparse: {sentence}\n")
    for arguments, words in [
        (["--plot", "errors"], "--plot errors is a picture and needs a file: --out errors.png"),
        (["--plot", "errors", "--out", tmp_path / "t.csv"], "--plot errors is a picture and needs a file"),
        (["--plot", "errors", "--out", tmp_path / "p.html"], "the page has all pictures: leave --plot out"),
        (["--out", tmp_path / "t.xlsx"], "t.xlsx: a table ends in .csv, .htm, .html, .tex or .md, a picture in .pdf"),
    ]:
        code, out, err = command(tmp_path / "runs", *arguments)
        assert (code, out, words in err) == (2, "", True), err
    assert command(tmp_path / "runs", "--out", tmp_path / "t.xlsx", "--format", "csv")[0] == 0


def test_a_narrow_terminal_gets_fewer_columns_and_no_broken_word():
    for width in (40, 60, 80, 100):
        lines = shown(runs_table(TWO, width=width), width).splitlines()
        assert max(map(len, lines)) <= width
        said, _, left_out = " ".join(" ".join(lines).split()).partition("not shown on")
        assert {"wanda", "entropy", "pruned", "12.50"} <= set(said.split())
        assert ("host MiB" in left_out) == ("MiB" not in said.split())
        assert ("kept," in left_out) == ("kept" not in said.split())


def test_importing_tables_loads_nothing_heavy():
    heavy = ["pandas", "matplotlib", "torch", "numpy", "hydra", "wandb", "rich"]
    code = f"import sys, esparse.tables; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
