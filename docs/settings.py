"""Writes settings.md beside this file: all groups, options and settings, from the classes and the YAML files.

    python docs/settings.py

Nothing of that page is written by hand. An option's text is the sentence that its YAML file begins with; a setting's
is the comment behind its field in the class, with the comment lines right above the field; its default is what
conf/ says. A test compares the page with what this script makes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from esparse.parts import numbers
from esparse.records.groups import ANY, GROUPS
from esparse.run.settings import Experiment

CONF = Path(__file__).parents[1] / "conf"
PAGE = Path(__file__).with_name("settings.md")
LAUNCHER = CONF / "hydra" / "launcher"
NAMES = ("name", "corpus", "corpora")  # settings that mostly repeat the option
MOST = 6  # defaults that one cell shows; a model's path, for instance, stands beside its option instead
HEAD = """\
# Settings

<!-- Written by `python docs/settings.py` from the classes and conf/: edit those, then run it. -->

`GROUP=OPTION` chooses an option, `GROUP.SETTING=VALUE` changes one of its numbers, and `NAME=VALUE` one of the plain
values below. With `-m`, values that are separated by commas become runs of a sweep. `python launch.py --help` says the
same, shorter. *null* means that nothing is asked for; what happens then stands beside it.
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of one option."""

    option: str
    name: str
    default: str
    meaning: str


def page() -> str:
    return "\n".join([HEAD, plain_values(), methods(), *(group(name) for name in GROUPS), launchers()])


def plain_values() -> str:
    usual = of_file(CONF / "config.yaml")
    rows = [
        Setting("", name, shown(usual[name]), meanings(Experiment)[name])
        for name in (field.name for field in fields(Experiment))
        if name not in GROUPS
    ]
    return "\n".join(["## Plain values\n", *table(rows, ""), ""])


def methods() -> str:
    """The published methods by name, with the options that each of them sets."""
    lines = [
        "## method\n",
        "A published method by name: it sets the parts as its authors do. Single ones may be changed behind it "
        "(`method=ria shuffle=none`); parts that are not named here stay off.\n",
        "| option | what it is | sets |",
        "|---|---|---|",
    ]
    for path in sorted((CONF / "method").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        parts = [next(iter(entry.items())) for entry in content.pop("defaults") if isinstance(entry, dict)]
        set_here = {where.rpartition("/")[2]: option for where, option in parts} | content
        acting = [f"`{name}={value}`" for name, value in set_here.items() if value not in ("none", "uniform")]
        text = cell(sentence(first_comment(path).removeprefix("@package _global_").strip()))
        lines.append(f"| `{path.stem}` | {text} | {' '.join(acting)} |")
    return "\n".join([*lines, ""])


def group(name: str) -> str:
    """A section: its options with their sentences, then its settings."""
    files = {path.stem: path for path in (CONF / name).glob("*.yaml")}
    known = [option for option in (*GROUPS[name].options, *GROUPS[name].notes) if option in files]
    options = list(dict.fromkeys([*known, *sorted(files)]))
    lines = [f"## {name}\n", f"{purposes()[name]}\n", "| option | what it is |", "|---|---|"]
    lines += [f"| `{option}` | {described(name, files[option])} |" for option in options]
    with_class = [option for option in options if option in GROUPS[name].options or ANY in GROUPS[name].options]
    if settings := [setting for option in with_class for setting in settings_of(name, option)]:
        lines += ["", *table(settings, f"{name}.")]
    return "\n".join([*lines, ""])


def described(name: str, path: Path) -> str:
    """An option's sentence, and of a model its path."""
    of_hub = of_file(path).get("path") if name == "model" else None
    return cell(sentence(first_comment(path))) + (f" `{of_hub}`" if of_hub not in (None, "???") else "")


def settings_of(name: str, option: str) -> Iterator[Setting]:
    """The settings of an option, with what its files say and else what its class does."""
    component = GROUPS[name].component(option)
    values = numbers.settings_of(name, option, lambda group, of: GROUPS[group].component(of)).values
    said = meanings(component)
    for field in fields(component):
        value = values.get(field.name, field.default)
        its_name = field.name in NAMES and value in (option, [option])
        yield Setting(option, field.name, "its name" if its_name else default(value), said[field.name])


def default(value: Any) -> str:
    if value is MISSING or value == "???":
        return "has to be given"
    if isinstance(value, numbers.Nested):
        return f"`{value.name}`"
    return shown(value)


def shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"`[{','.join(map(str, value))}]`"
    if isinstance(value, dict):
        return "`{}`"
    if isinstance(value, str) and (environment := re.fullmatch(r"\$\{oc\.env:(\w+),(\w+)\}", value)):
        return f"`{environment[1]}`, else {environment[2]}"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def table(settings: list[Setting], prefix: str) -> list[str]:
    """A row per setting; what differs between options says of which it is."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name in dict.fromkeys(setting.name for setting in settings):
        these = [setting for setting in settings if setting.name == name]
        everywhere = {setting.option for setting in these} == {setting.option for setting in settings}
        defaults = gathered({setting.option: setting.default for setting in these}, alone=True)
        texts = gathered({setting.option: cell(setting.meaning) for setting in these}, alone=everywhere, of="of ")
        lines.append(f"| `{prefix}{name}` | {defaults} | {texts} |")
    return lines


def gathered(by_option: dict[str, str], *, alone: bool, of: str = "") -> str:
    """One text of several options', each with the options that it is of; without them if all have it, `alone`."""
    options: dict[str, list[str]] = {}
    for option, text in by_option.items():
        options.setdefault(text, []).append(f"`{option}`")
    if alone and len(options) == 1:
        return next(iter(options))
    if not of and len(options) > MOST:
        return "by option"
    sign = ":" if of else ""
    return "; ".join(f"{of}{', '.join(names)}{sign} {text}".rstrip() for text, names in options.items())


def launchers() -> str:
    lines = [
        "## hydra/launcher\n",
        "Which machine carries out the runs of a sweep (`-m`): [On a cluster](cluster.md).\n",
        "| option | what it is |",
        "|---|---|",
        "| `basic` | The default: one run after the other, in this process. |",
    ]
    paths = sorted(LAUNCHER.glob("*.yaml"), key=lambda path: (path.stem != "local", path.stem != "site", path.stem))
    lines += [f"| `{path.stem}` | {cell(sentence(first_comment(path)))} |" for path in paths]
    said, values = comments((LAUNCHER / "site.yaml").read_text()), of_file(LAUNCHER / "site.yaml")
    rows = [Setting("", name, shown(value), said[name]) for name, value in values.items()]
    lines += ["", "Settings of `site`, and of those that begin with it:\n", *table(rows, "hydra.launcher."), ""]
    return "\n".join(lines)


@cache
def meanings(component: type) -> dict[str, str]:
    """What the comments say of each field, of the base classes' fields too."""
    said: dict[str, str] = {}
    for one in reversed(component.__mro__):
        if "__dataclass_fields__" in vars(one):
            said |= {name: text for name, text in of_class(one).items() if text or name not in said}
    return said


def of_class(component: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(component))
    by_line = {
        token.start[0]: (token.string.lstrip("# ").strip(), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    said = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, line = [], node.lineno - 1
            while line in by_line and by_line[line][1]:  # comment lines right above the field
                above.insert(0, by_line[line][0])
                line -= 1
            behind = by_line.get(node.end_lineno or node.lineno, ("", False))[0]
            said[node.target.id] = ". ".join(text for text in (behind, " ".join(above)) if text)
    return said


def comments(text: str) -> dict[str, str]:
    """The comment behind each key of the first level of a YAML file."""
    found = re.findall(r"^(\w+):[^#\n]*(?:#\s*(.*))?$", text, flags=re.M)
    return {name: said.strip() for name, said in found}


@cache
def purposes() -> dict[str, str]:
    """What conf/config.yaml says of each group, up to the first semicolon, as a sentence."""
    text = (CONF / "config.yaml").read_text()
    said = re.findall(r"^  - (\w+): \w+ # ([^;\n]*)", text, flags=re.M)
    return {name: sentence(purpose[:1].upper() + purpose[1:]) for name, purpose in said}


def of_file(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text())
    return {name: value for name, value in values.items() if name not in ("defaults", "hydra")}


def first_comment(path: Path) -> str:
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def sentence(text: str) -> str:
    return text + ("" if text.endswith((".", "?", ")")) else ".")


def cell(text: str) -> str:
    """Fit for a cell of a table in Markdown: what stands between backticks is left alone, but for its bars."""
    parts = re.split(r"(`[^`]*`)", text.replace("None:", "null:"))
    escaped = (part if part.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", part) for part in parts)
    return "".join(escaped).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(PAGE.read_text().splitlines())} lines")
