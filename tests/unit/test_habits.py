"""What maintainers rely on: pre-commit hooks, the public workflow, and issue forms."""

import re

import pytest
import yaml
from paths import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()


def recipe(target):
    """The commands of a Makefile's target, with its variables expanded as make does."""
    variables = dict(re.findall(r"^(\w+) :?= (.+)$", MAKEFILE, re.M))
    (lines,) = re.findall(rf"^{target}:.*\n((?:\t.+\n)+)", MAKEFILE, re.M)
    text = re.sub(r"\\\n", " ", lines)
    for name in ("BIN", "NOTEBOOKS"):
        text = text.replace(f"$({name})", variables[name])
    return [line.strip().lstrip("@") for line in text.splitlines()]


def hooks():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]  # nothing to download
    return config["repos"][0]["hooks"]


def test_hooks_run_the_commands_of_make_lint():
    entries = [hook["entry"] for hook in hooks()]
    lint = [re.sub(r" \$\(wildcard .*\)$", "", line) for line in recipe("lint")]
    assert entries == lint
    assert {hook["language"] for hook in hooks()} == {"system"}


def test_the_notebook_hook_checks_the_notebooks_of_make_lint():
    (pattern,) = [hook["files"] for hook in hooks() if "files" in hook]
    (globs,) = re.findall(r"^NOTEBOOKS :?= \$\(wildcard (.+)\)$", MAKEFILE, re.M)
    linted = {path.relative_to(ROOT).as_posix() for g in globs.split() for path in ROOT.glob(g)}
    everywhere = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("[!.]*/**/*.ipynb")}
    assert len(linted) > 9
    assert {path for path in everywhere if re.search(pattern, path)} == linted


def test_the_public_workflow_runs_the_script_of_ci():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads the key `on` as true
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_the_keys_that_github_requires(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
        if field["type"] == "checkboxes":
            assert all(option["label"] for option in field["attributes"]["options"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])
