"""A wheel in a fresh environment: what someone who has no checkout can do."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from studies import BASE

from lowrank_lab.training.provenance import SUFFIXES, source_hash

BUILT_FROM = ("lowrank_lab", "notebooks", "data/study", "pyproject.toml", "setup.py", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what it is built from, by way of a source distribution."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    hidden = shutil.ignore_patterns(".*", "__pycache__")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=hidden)
        else:
            shutil.copyfile(ROOT / name, source / name)
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    said = succeeds([sys.executable, "-c", program], source)
    sdist = out / said.splitlines()[-1]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    succeeds([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of an environment with the wheel and the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    options = ["--quiet", "--no-deps", "--no-index", "--prefix", str(folder)]
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", *options]
    succeeds([*pip, str(wheel)], folder)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(packages))  # an editable install there is unseen
    where = succeeds([python, "-c", "import lowrank_lab; print(lowrank_lab.__file__)"], folder)
    assert Path(where.strip()).is_relative_to(folder)
    return folder / "bin"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """An empty working directory, and no data folder in the environment."""
    monkeypatch.delenv("LOWRANK_LAB_DATA", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def succeeds(command, folder):
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=900,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_the_library_its_notebooks_and_studies_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    shipped = {p.removeprefix("lowrank_lab/shipped/") for p in names if "/shipped/" in p}
    there = [p.relative_to(ROOT).as_posix() for p in (ROOT / "notebooks").rglob("*.*")]
    there = [name for name in there if name.endswith((".ipynb", ".yaml", "own_method.py"))]
    kept = [p.relative_to(ROOT).as_posix() for p in (ROOT / "data/study").glob("*/*.parquet")]
    hidden = [name for name in there if "/." in name]
    assert shipped == {*there, *kept, "data/study/README.md"} - set(hidden)
    suffixes = SUFFIXES | {".css", ".js"}  # what trains, and the explorer's page
    sources = [p for p in (ROOT / "lowrank_lab").rglob("*") if p.suffix in suffixes]
    own = {p.relative_to(ROOT).as_posix() for p in sources}
    assert names - {f"lowrank_lab/shipped/{p}" for p in shipped} == own | {"lowrank_lab/py.typed"}
    assert wheel.stat().st_size < 10 * 2**20


def test_an_installed_library_counts_as_the_same_source(installed, mine):
    program = "from lowrank_lab.training.provenance import source_hash; print(source_hash())"
    assert succeeds([installed / "python", "-c", program], mine).strip() == source_hash()


def test_a_study_of_ones_own_runs_to_the_report_where_there_is_no_checkout(
    installed, mine, text_corpus
):
    content = {"base": {**BASE, "corpus": text_corpus}, "variants": {"a": {}, "b": {"lr": 1e-3}}}
    (mine / "mine.yaml").write_text(yaml.safe_dump(content))
    said = succeeds([installed / "lowrank-lab", "study", "mine.yaml"], mine)
    page = mine / "data" / "runs" / "mine" / "report.html"
    assert str(page) in said
    assert page.stat().st_size > 10_000
    assert {p.name for p in mine.iterdir()} == {"mine.yaml", "data"}


def test_a_study_of_the_library_can_be_planned_by_its_name(installed, mine):
    options = ["--dry-run", "--flops", "1e12", "--json"]
    plan = json.loads(succeeds([installed / "lowrank-lab", "study", "quick", *options], mine))
    assert len(plan["runs"]) == 7
    assert plan["folder"] == str(mine / "data" / "runs" / "quick")


@pytest.mark.parametrize("name", ["00_start_here", "08_your_own_method"])
def test_a_copied_notebook_runs_and_shares_the_data_folder(installed, mine, name):
    said = succeeds([installed / "lowrank-lab", "notebooks", "copy", "notebooks"], mine)
    assert str(mine / "data") in said
    papermill = [installed / "python", "-m", "papermill", "--kernel", "python3"]
    text = f"text:{ROOT / 'lowrank_lab'}"  # long enough for 512 tokens of vocabulary
    given = ["-p", "corpus", text, "-p", "steps", "60", "--log-level", "ERROR"]
    succeeds([*papermill, f"{name}.ipynb", mine / "out.ipynb", *given], mine / "notebooks")
    outputs = [
        output
        for cell in json.loads((mine / "out.ipynb").read_text())["cells"]
        for output in cell.get("outputs", [])
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {p.name for p in (mine / "data").iterdir()} == {"corpora", "runs"}
    assert not (mine / "notebooks" / "data").exists()
