"""Studies executed to their end: reports, failures, killed and interrupted runners, limits."""

import json
import shutil
import signal
import time
from types import SimpleNamespace

import nbformat
from click.testing import CliRunner
from studies import TRAIN, mark_done, processes_in, runner_of, wait_for

from lowrank_lab.cli import main
from lowrank_lab.runs.run import Run
from lowrank_lab.studies import local_executor as running_jobs
from lowrank_lab.studies.plan import plan_study
from lowrank_lab.studies.study import run_study
from lowrank_lab.studies.study_file import load_study
from lowrank_lab.training.loop import train


def executed(path, out, **options):
    """The states of a study's runs after these are executed, without the comparison."""
    jobs = plan_study(path, out=out).jobs
    running_jobs.execute(jobs, 1, options.get("retry", False), lambda jobs: None)
    return [job.state for job in jobs]


def test_a_relative_corpus_is_looked_for_where_the_study_was_started(
    study_file, text_folder, tmp_path, monkeypatch
):
    shutil.copytree(text_folder, tmp_path / "here" / "texts")
    monkeypatch.chdir(tmp_path / "here")
    path = study_file(code=TRAIN, base={"corpus": "text:texts"})
    assert executed(path, tmp_path / "out") == ["done"]


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
    stems = {p.stem for p in (out / "figures").iterdir()}
    assert {"tradeoff", "tradeoff_peak"} <= stems
    assert page.count("<figure>") == len(stems)
    assert 'src="http' not in page
    assert 'href="http' not in page
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
    marker, out = tmp_path / "mended", tmp_path / "out"
    code = f"import pathlib\nassert seed != 1 or pathlib.Path({str(marker)!r}).exists(), 'seed 1'"
    path = study_file(code, seeds=[1, 0])
    jobs, page = run_study(path, out=out, jobs=1)
    assert [job.state for job in jobs] == ["failed", "done"]
    assert page is None
    assert "AssertionError: seed 1" in jobs[0].error
    assert "AssertionError" in (jobs[0].folder / "notebook.ipynb").read_text()
    marker.touch()
    jobs, _ = run_study(path, out=out)
    assert [job.state for job in jobs] == ["failed", "done"]  # only asked for is it retried
    jobs, _ = run_study(path, out=out, retry=True)
    assert [job.state for job in jobs] == ["done", "done", "done"]  # and the comparison


def test_a_run_that_other_training_code_made_is_trained_again_unless_any_will_do(
    study_file, tmp_path
):
    path, out = study_file(TRAIN), tmp_path / "out"
    ((run_id, (_, config)),) = load_study(path).runs.items()
    train(config, out / run_id)
    facts = json.loads((out / run_id / "config.json").read_text())
    facts["ran_on"]["training_source"] = "another"
    (out / run_id / "config.json").write_text(json.dumps(facts))
    before = (out / run_id / "result.json").stat().st_mtime_ns
    jobs = plan_study(path, out=out, reuse=True).jobs
    running_jobs.execute(jobs, 1, False, lambda jobs: None)
    assert [job.state for job in jobs] == ["done"]
    assert (out / run_id / "result.json").stat().st_mtime_ns == before
    (out / run_id / "done.json").unlink()
    assert executed(path, out) == ["done"]
    assert (out / run_id / "result.json").stat().st_mtime_ns > before
    assert len(list((out / ".outdated").iterdir())) == 1


def test_a_study_takes_over_runs_that_other_studies_have(study_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path / "data"))
    path, out = study_file(TRAIN, variants={"new name": {}}, seeds=[0, 1]), tmp_path / "out"
    first, second = load_study(path).runs.items()
    kept = tmp_path / "data" / "study" / "earlier" / first[0]
    train(first[1][1], kept, label="old name")
    (kept / "model.safetensors").unlink()  # as `report --keep` keeps it
    unfinished = tmp_path / "data" / "runs" / "other" / second[0]
    shutil.copytree(kept, unfinished)
    (unfinished / "result.json").unlink()
    said = CliRunner().invoke(main, ["study", str(path), "--out", str(out), "--reuse", "--dry-run"])
    assert [line.split()[0] for line in said.stdout.splitlines()[1:3]] == ["trained", "queued"]
    assert "2 to run, 1 of them trained already" in said.stdout
    assert {job.state for job in run_study(path, out=out, reuse=True)[0]} == {"done"}
    taken, trained = (Run(out / run_id) for run_id in (first[0], second[0]))
    assert taken.result["seconds"] == Run(kept).result["seconds"]
    assert (taken.label, trained.label, Run(kept).label) == ("new name", "new name", "old name")
    assert (trained.folder / "model.safetensors").exists()
    assert not (taken.folder / "model.safetensors").exists()


def test_a_killed_runner_leaves_no_process_and_goes_on_inside_the_run(study_file, tmp_path):
    fields = {"tokens": 6400, "checkpoint_every": 20, "eval_every": 200, "spectra_every": 200}
    path, out = study_file(TRAIN, base=fields, seeds=[0, 1]), tmp_path / "out"
    done = mark_done(plan_study(path, out=out).jobs[0])
    runner = runner_of(path, out, "--jobs", "1")
    try:
        wait_for(lambda: any(out.glob("*/checkpoints/step-*")))
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    wait_for(lambda: not processes_in(tmp_path), 20)
    halfway = next(p.parents[1] for p in out.glob("*/checkpoints/step-*"))
    assert not (halfway / "result.json").exists()
    marked = done.stat().st_mtime_ns
    assert executed(path, out) == ["done", "done"]
    assert done.stat().st_mtime_ns == marked
    _, config = load_study(path).runs[halfway.name]
    run, undisturbed = Run(halfway), train(config, tmp_path / "undisturbed")
    assert run.result["test_loss"] == undisturbed.result["test_loss"]
    assert run.metrics["step"].tolist() == list(range(1, 201))


def test_an_interrupted_runner_ends_what_runs_and_says_so_in_one_line(study_file, tmp_path):
    path, out = study_file("import time\ntime.sleep(100)", seeds=[0, 1]), tmp_path / "out"
    runner = runner_of(path, out, "--jobs", "2")
    try:
        wait_for(lambda: len(list(out.glob("*/.partial.ipynb"))) == 2)
        runner.send_signal(signal.SIGINT)
        _, said = runner.communicate(timeout=30)
    finally:
        runner.kill()
    assert runner.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted")
    assert not processes_in(tmp_path)
    assert not list(out.glob("*/*ed.json"))  # neither done nor failed


def test_a_run_above_its_time_limit_fails_and_a_longer_one_goes_on_inside_it(
    study_file, tmp_path, monkeypatch
):
    marker, out = tmp_path / "mended", tmp_path / "out"
    hangs = f"""import os
print('as far as it went')
pause = lambda row: time.sleep(1000 * (row['step'] == 16 and not os.path.exists({str(marker)!r})))
# %%
"""
    code = TRAIN.replace("# %%\n", hangs)
    path = study_file(code, base={"checkpoint_every": 5}, time_limit="1h")

    def leaping():  # a clock on which the limit is over as soon as the run hangs
        return time.monotonic() + 3600 * any(out.glob("*/checkpoints/step-00000015"))

    clock = SimpleNamespace(monotonic=leaping, sleep=time.sleep)
    with monkeypatch.context() as patch:
        patch.setattr(running_jobs, "time", clock)
        (job,), page = run_study(path, out=out)
    assert (job.state, page) == ("failed", None)
    assert job.error.startswith("it took longer than the time limit of 3600 s")
    assert not processes_in(tmp_path)
    notebook = nbformat.read(job.folder / "notebook.ipynb", as_version=4)
    assert "as far as it went" in str(notebook.cells[-2].outputs)
    assert (job.folder / "checkpoints" / "step-00000015").exists()
    assert executed(path, out) == ["failed"]  # not tried again unasked
    marker.touch()
    assert executed(path, out, retry=True) == ["done"]
    rows = Run(job.folder).metrics
    assert rows["step"].tolist() == list(range(1, 21))
    assert rows["seconds"].is_monotonic_increasing
