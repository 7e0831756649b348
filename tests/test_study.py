"""Studies: what a file asks for, what is executed, what survives a killed runner."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from click.testing import CliRunner

from lowrank_lab.cli import main
from lowrank_lab.jobs import parameter_names
from lowrank_lab.runs import Run
from lowrank_lab.study import load_study, run_study

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
BASE = {
    "model": "tiny", "vocab_size": 300, "sequence_length": 16, "batch": 2, "tokens": 640,
    "eval_tokens": 64, "test_tokens": 64,
}  # fmt: skip
PARAMETERS = "seed: int = 0  # s\nlabel: str = ''  # l\nfolder: str = ''  # f\n"
PARAMETERS += "headless: bool = True  # h\nmore: dict = {}  # m\n"
COMPARE = "folder = ''\nout = ''\ntitle = ''\ndescription = ''\nresults = ''\n"


def write_notebook(path, parameters, code):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [cell, nbformat.v4.new_code_cell(code)]
    nbformat.write(notebook, path)


@pytest.fixture
def study_file(tmp_path, text_corpus):
    """Writes a study file beside copies of the notebooks, and returns its path."""
    folder = tmp_path / "notebooks"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns("studies", ".*"))
    (folder / "studies").mkdir()

    def write(**content):
        base = {**BASE, "corpus": text_corpus, **content.pop("base", {})}
        path = folder / "studies" / "mine.yaml"
        path.write_text(yaml.safe_dump({"base": base, **content}, sort_keys=False))
        return path

    return write


def test_runs_are_variants_times_grid_times_seeds(study_file):
    variants = {"a": {"method": "low-rank"}, "b": {"method": "galore"}}
    study = load_study(study_file(variants=variants, grid={"rank": [2, 4]}, seeds=[0, 1]))
    found = [(label, c.method, c.rank, c.seed) for label, c in study.runs.values()]
    assert found == [
        (f"{label}, rank {rank}", method, rank, seed)
        for label, method in (("a", "low-rank"), ("b", "galore"))
        for rank in (2, 4)
        for seed in (0, 1)
    ]


def test_seeds_can_be_given_instead_of_those_in_the_file(study_file):
    study = load_study(study_file(seeds=[0]), seeds=[3, 4])
    assert [config.seed for _, config in study.runs.values()] == [3, 4]


def test_points_that_train_the_same_are_run_once(study_file):
    study = load_study(study_file(base={"method": "full-rank"}, grid={"rank": [2, 4, 8]}))
    assert len(study.runs) == 1


def test_the_quick_study_is_valid():
    study = load_study(NOTEBOOKS / "studies" / "quick.yaml")
    methods = {config.method for _, config in study.runs.values()}
    assert methods == {"full-rank", "low-rank", "galore", "fira"}
    tokens = {c.total_steps * c.tokens_per_step for _, c in study.runs.values()}
    assert len(tokens) == 1  # compared at equal tokens


def test_parameter_names_are_those_of_the_tagged_cell():
    assert {"method", "more", "folder"} <= parameter_names(NOTEBOOKS / "02_run.ipynb")


def test_a_notebook_without_the_parameters_a_study_gives_is_refused(study_file):
    path = study_file(notebook="short")
    write_notebook(path.parent.parent / "short.ipynb", "seed = 0", "1")
    result = CliRunner().invoke(main, ["study", str(path), "--out", str(path.parent / "out")])
    assert result.exit_code == 2
    assert "short.ipynb: folder" in result.stderr
    assert not list(path.parent.rglob("*.log"))  # no kernel was started


def test_a_study_ends_in_table_figures_and_report_and_is_not_repeated(study_file, tmp_path):
    variants = {
        "full-rank": {"method": "full-rank"},
        "low-rank + both": {"method": "low-rank", "refactor_every": 5, "reset_every": 10},
    }
    path, out = study_file(variants=variants), tmp_path / "out"
    result = CliRunner().invoke(main, ["study", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "low-rank + both" in result.stdout
    assert str(out / "report.html") in result.stdout
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 8
    assert 'src="http' not in page
    assert 'href="http' not in page
    stems = {p.stem for p in (out / "figures").iterdir()}
    for stem in stems:
        assert all(
            (out / "figures" / f"{stem}.{kind}").stat().st_size for kind in ("png", "svg", "csv")
        )
    for name, pictures in (("tiny-*/notebook.ipynb", 5), ("comparison/notebook.ipynb", 8)):
        for notebook in out.glob(name):
            cells = json.loads(notebook.read_text())["cells"]
            shown = [
                o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
            ]
            assert len(shown) == pictures
    executed = {p: p.stat().st_mtime_ns for p in out.rglob("*.ipynb")}
    assert len(executed) == 3
    again = CliRunner().invoke(main, ["study", str(path), "--out", str(out)])
    assert again.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.ipynb")} == executed


def test_a_failing_run_is_recorded_and_the_others_go_on(study_file, tmp_path):
    path, out = study_file(notebook="fails", compare="empty", seeds=[0, 1, 2]), tmp_path / "out"
    marker = tmp_path / "mended"
    code = f"import pathlib\nassert seed != 1 or pathlib.Path({str(marker)!r}).exists(), 'seed 1'"
    write_notebook(path.parent.parent / "fails.ipynb", PARAMETERS, code)
    write_notebook(path.parent.parent / "empty.ipynb", COMPARE, "1")
    jobs, page = run_study(path, out=out)
    assert [job.state for job in jobs] == ["done", "failed", "done"]
    assert page is None
    assert "AssertionError: seed 1" in jobs[1].error
    assert "AssertionError" in (jobs[1].folder / "notebook.ipynb").read_text()
    marker.touch()
    jobs, _ = run_study(path, out=out)
    assert [job.state for job in jobs] == ["done", "failed", "done"]  # only asked for is it retried
    jobs, _ = run_study(path, out=out, retry=True)
    assert [job.state for job in jobs] == ["done", "done", "done", "done"]  # and the comparison


def test_a_run_that_other_training_code_made_is_trained_again(study_file, tmp_path):
    path, out = study_file(), tmp_path / "out"
    (first,), _ = run_study(path, out=out, report=lambda jobs: None)[0][:1], None
    facts = json.loads((first.folder / "config.json").read_text())
    facts["ran_on"]["training_source"] = "another"
    (first.folder / "config.json").write_text(json.dumps(facts))
    (first.folder / "done.json").unlink()
    before = (first.folder / "result.json").stat().st_mtime_ns
    run_study(path, out=out)
    assert (first.folder / "result.json").stat().st_mtime_ns > before
    assert len(list((out / ".outdated").iterdir())) == 1


def processes_in(folder):
    """Processes that work in a folder or name it in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = " ".join(process.info["cmdline"] or [])
        if process.pid != os.getpid() and (
            str(folder) in words or process.info["cwd"] == str(folder)
        ):
            found.append(process.pid)
    return found


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_killed_runner_leaves_no_process_and_goes_on_inside_the_run(study_file, tmp_path):
    fields = {"tokens": 12800, "checkpoint_every": 20, "eval_every": 400, "spectra_every": 400}
    path, out = study_file(base=fields, seeds=[0, 1]), tmp_path / "out"
    command = [sys.executable, "-m", "lowrank_lab.cli", "study", str(path), "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runner = subprocess.Popen(
        [*command, "--out", str(out)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: any(out.glob("*/done.json")))
        done = next(out.glob("*/done.json"))
        wait_for(lambda: any(p.parents[1] != done.parent for p in out.glob("*/checkpoints/step-*")))
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    wait_for(lambda: not processes_in(tmp_path), 20)
    halfway = next(p.parents[1] for p in out.glob("*/checkpoints/step-*"))
    assert not (halfway / "result.json").exists()
    finished = done.stat().st_mtime_ns
    subprocess.run([*command, "--out", str(out)], env=environment, check=True, capture_output=True)
    assert done.stat().st_mtime_ns == finished
    undisturbed, _ = run_study(path, out=tmp_path / "undisturbed", jobs=1)
    for job in undisturbed[:2]:
        run = Run(out / job.folder.name)
        assert run.result["test_loss"] == Run(job.folder).result["test_loss"]
        assert run.metrics["step"].tolist() == list(range(1, 401))
