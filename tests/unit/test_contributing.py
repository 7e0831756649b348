"""What contributors read is true: the commands, paths and names in CONTRIBUTING and CHANGELOG."""

import importlib
import re
import shlex

import pytest
import yaml
from paths import ROOT

from lowrank_lab.cli import main

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
GENERATED = (".venv", "build", "dist", "data/runs")  # not in git
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_contributing_is_read_in_five_minutes():
    assert len(TEXT.splitlines()) <= 150


def test_targets_that_contributing_names_are_in_the_makefile():
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    named = set(re.findall(r"(?:`|^    )make ([\w-]+)", TEXT, re.M))
    assert {"lint", "test", "test-all", "docs", "figures"} <= named
    assert named <= set(phony.split())


def test_commands_that_contributing_names_exist_with_their_options():
    lines = re.findall(r"lowrank-lab (\w+)([^`\n#]*)", TEXT)
    assert {"study", "report"} <= {command for command, _ in lines}
    for command, rest in lines:
        known = {option for p in main.commands[command].params for option in p.opts}
        assert {word for word in rest.split() if word.startswith("--")} <= known, (command, rest)


def test_paths_that_contributing_names_exist():
    spans = [*re.findall(r"`([^`\n]+)`", TEXT), *re.findall(r"^ {4,}(\S.*)$", TEXT, re.M)]
    words = [word for span in spans for word in shlex.split(span, comments=True)]
    paths = [w for w in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)+|[\w-]+\.(md|cff|txt)", w)]
    assert len(paths) > 15
    wrong = [p for p in paths if not p.startswith(GENERATED) and not (ROOT / p).exists()]
    assert not wrong


def changelog():
    """Version → its text, in the order of the file."""
    parts = re.split(r"^## \[(.+)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    return {name: (date, text) for name, date, text in zip(*[iter(parts[1:])] * 3, strict=True)}


def test_the_changelog_has_the_released_version_below_what_is_unreleased():
    unreleased, released, *_ = changelog()
    assert unreleased == "Unreleased"
    assert released == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    for name, (date, text) in changelog().items():
        assert name == "Unreleased" or re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
        headings = re.findall(r"^### (.+)$", text, re.M)
        assert headings
        assert set(headings) <= SECTIONS


def new_names():
    """Dotted names in the second column of the changelog's tables of moved and renamed names."""
    rows = re.findall(r"^  \| `.*\| (`.*) \|$", changelog()["Unreleased"][1], re.M)
    for row in rows:
        names = re.findall(r"`([\w.]+)`", row)
        if names and names[0].startswith("lowrank_lab."):
            yield from (name.removeprefix("lowrank_lab.") for name in names)


@pytest.mark.parametrize("name", list(new_names()))
def test_a_name_that_the_changelog_calls_new_exists(name):
    parent, _, last = f"lowrank_lab.{name}".rpartition(".")
    module = importlib.import_module(parent)
    if not hasattr(module, last):
        importlib.import_module(f"{parent}.{last}")  # raises if there is no such module
