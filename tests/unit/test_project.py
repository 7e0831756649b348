"""The files around the library agree with each other: pins, environments, notebooks, documents."""

import ast
import importlib.metadata
import json
import re
import sys
import tomllib

import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

import lowrank_lab
from lowrank_lab.cli import main

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_pinned_to_a_version_it_allows(project, pins):
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *(r for extra in extras.values() for r in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_the_version_stands_in_one_place_and_the_citation_repeats_it(project):
    assert project["dynamic"] == ["version"]
    assert "version" not in project
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lowrank_lab.__version__


def test_the_command_says_the_version_of_a_checkout_that_is_not_installed(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    said = CliRunner().invoke(main, ["--version"])
    assert said.stdout.split() == ["lowrank-lab,", "version", lowrank_lab.__version__]


def test_conda_users_get_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["--constraint constraints.txt", "--editable ."]
    assert "python=3.11" in environment["dependencies"]


def imported_packages(folder):
    """Names of the packages outside the standard library that the modules of a folder import."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
    # where import and package differ
    names = {"yaml": "pyyaml", "IPython": "ipykernel", "PIL": "pillow"}
    others = found - set(sys.stdlib_module_names) - {"lowrank_lab", "tests"}
    return {canonicalize_name(names.get(name, name)) for name in others}


def test_what_the_library_imports_is_required(project):
    extras = project["optional-dependencies"]
    optional = [text for name in ("quant", "hub", "dask", "transformers") for text in extras[name]]
    texts = [*project["dependencies"], *optional]
    required = {canonicalize_name(Requirement(text).name) for text in texts}
    integrations = imported_packages(ROOT / "lowrank_lab" / "integrations") - required
    peers = {canonicalize_name(Requirement(text).name) for text in extras["peers"]}
    assert integrations <= peers
    assert imported_packages(ROOT / "lowrank_lab") - integrations <= required


def test_what_the_tests_import_is_in_the_extras(project):
    extras = project["optional-dependencies"]
    texts = [
        *project["dependencies"],
        *extras["peers"],
        *extras["dev"],
        *extras["quant"],
        *extras["hub"],
        *extras["tensorboard"],
    ]
    required = {canonicalize_name(Requirement(text).name) for text in texts}
    own = {canonicalize_name(p.stem) for p in (ROOT / "tests").rglob("*.py")} | {"benchmarks"}
    assert imported_packages(ROOT / "tests") - own <= required


def test_the_corpus_is_made_of_packages_that_are_pinned(pins):
    from lowrank_lab.data.sources import PACKAGES

    assert {canonicalize_name(p) for p in PACKAGES} <= set(pins)


def test_no_registry_host_is_named():
    # assembled, so that this file doesn't name them either
    hosts = ["py" + "pi.org", "python" + "hosted", "download." + "pytorch", "conda." + "anaconda"]
    for name in ("README.md", "Makefile", "environment.yml", "constraints.txt", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert not [host for host in hosts if host in text], name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_clean_short_and_says_more_than_it_computes(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert not [c for c in code if c["outputs"] or c["execution_count"]]
    assert [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    lengths = {c["id"]: len("".join(c["source"]).splitlines()) for c in code}
    assert max(lengths.values()) <= 12, lengths
    assert len(cells) - len(code) >= len(code) - 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_can_inspect_each_parameter(path):
    from papermill import inspect_notebook

    for name, parameter in inspect_notebook(str(path)).items():
        assert parameter["inferred_type_name"] not in ("", "None"), name
        assert parameter["help"], name


@pytest.mark.parametrize(
    ("folder", "most_files", "most_bytes"), [("data/study", 60, 8e6), ("figures", 40, 4e6)]
)
def test_what_git_keeps_of_results_stays_small(folder, most_files, most_bytes):
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert len(files) <= most_files
    assert sum(path.stat().st_size for path in files) <= most_bytes


def test_figures_has_the_pictures_that_the_readme_or_the_book_shows_and_no_others():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {
        name for page in pages for name in re.findall(r"figures/[\w/]+\.png", page.read_text())
    }
    pictures = (ROOT / "figures").rglob("*.png")
    assert {path.relative_to(ROOT).as_posix() for path in pictures} == shown
