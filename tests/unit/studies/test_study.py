"""Studies: what a file asks for and what is refused. Executed to their end: tests/slow."""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from paths import NOTEBOOKS
from studies import PARAMETERS, mark_done, write_notebook

from lowrank_lab.cli import main
from lowrank_lab.config import InputError
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.run import find_runs
from lowrank_lab.studies import local_executor as running_jobs
from lowrank_lab.studies import plan, study, study_file
from lowrank_lab.studies.job import Job, parameter_names
from lowrank_lab.studies.plan import plan_study
from lowrank_lab.studies.progress import View
from lowrank_lab.studies.study_file import load_study, seconds_of


def test_variants_that_only_a_gpu_tells_apart_are_refused(study_file):
    svd = {"method": "galore", "rank": 2, "method_options": {"refresh": "svd"}}
    variants = {"default": {"method": "galore", "rank": 2}, "exact": svd}
    with pytest.raises(InputError, match=r"exact: refresh: 'svd' .* 'auto' of default it counts"):
        load_study(study_file(variants=variants))
    del variants["default"]
    assert len(load_study(study_file(variants=variants)).runs) == 1


def test_runs_are_variants_times_grid_times_seeds(study_file):
    variants = {"a": {"method": "low-rank"}, "b": {"method": "galore"}}
    found = load_study(study_file(variants=variants, grid={"rank": [2, 4]}, seeds=[0, 1]))
    points = [(label, c.method, c.rank, c.seed) for label, c in found.runs.values()]
    assert points == [
        (f"{label}, rank {rank}", method, rank, seed)
        for label, method in (("a", "low-rank"), ("b", "galore"))
        for rank in (2, 4)
        for seed in (0, 1)
    ]


def test_a_variant_can_have_a_grid_and_seeds_of_its_own(study_file):
    variants = {"a": {"method": "low-rank", "seeds": [1, 2], "grid": {"rank": [2, 4]}}, "b": {}}
    path = study_file(variants=variants, seeds=[0])
    assert [(label, c.seed) for label, c in load_study(path).runs.values()] == [
        ("a, rank 2", 1), ("a, rank 2", 2), ("a, rank 4", 1), ("a, rank 4", 2), ("b", 0),
    ]  # fmt: skip
    assert {c.seed for _, c in load_study(path, seeds=[7]).runs.values()} == {7}


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"grid": [1]}, r"variants: a: grid: \[1\] is not allowed; must be a mapping"),
        ({"grid": {"lr": 1}}, "variants: a: lr: 1 is not allowed; must be a list"),
        ({"seeds": []}, r"variants: a: seeds: \[\] is not allowed; must be a list"),
        ({"select": "x"}, "variants: a: select: 'x' is not allowed; must be a mapping"),
    ],
)
def test_what_is_wrong_in_a_variant_is_one_line(study_file, variant, message):
    with pytest.raises(InputError, match=message):
        load_study(study_file(variants={"a": variant}))


def test_seeds_can_be_given_instead_of_those_in_the_file(study_file):
    found = load_study(study_file(seeds=[0]), seeds=[3, 4])
    assert [config.seed for _, config in found.runs.values()] == [3, 4]


def test_some_variants_of_a_study_can_be_run_alone(study_file):
    variants = {"a b": {}, "c": {"rank": 3, "method": "low-rank"}, "d": {"lr": 1e-3}}
    path = study_file(variants=variants, seeds=[0])
    found = load_study(path, only=["d", "a b"])
    assert [label for label, _ in found.runs.values()] == ["a b", "d"]
    with pytest.raises(InputError, match=r"only: 'cc' is not allowed; no such variant.*'c'\?"):
        load_study(path, only=["cc"])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("a", "pairs: 'a' is not allowed; must be a list"),
        ([["a"]], r"pairs: \['a'\] is not allowed; must be two labels"),
        ([["a", "a"]], "must be two labels"),
        ([["a", "bb"]], r"pairs: 'bb' is not allowed; no such label; did you mean 'b'\?"),
    ],
)
def test_a_question_that_names_no_two_labels_is_refused(study_file, pairs, message):
    variants = {"a": {}, "b": {"lr": 1e-3}}
    with pytest.raises(InputError, match=message):
        load_study(study_file(variants=variants, pairs=pairs))


def test_of_a_part_of_a_study_the_questions_about_that_part_are_asked(study_file):
    variants = {"a": {}, "b": {"lr": 1e-3}, "c": {"lr": 2e-3}}
    path = study_file(variants=variants, pairs=[["a", "c"], ["b", "a"]])
    assert load_study(path).pairs == (("a", "c"), ("b", "a"))
    assert load_study(path, only=["a", "b"]).pairs == (("b", "a"),)


def test_points_that_train_the_same_are_run_once(study_file):
    found = load_study(study_file(base={"method": "full-rank"}, grid={"rank": [2, 4, 8]}))
    assert len(found.runs) == 1


def test_the_quick_study_is_a_part_of_the_ladder_and_its_kept_records_have_its_runs(monkeypatch):
    monkeypatch.setattr(
        study_file, "check", lambda config: (resolve(config), None)
    )  # corpus unread
    studies = NOTEBOOKS / "studies"
    quick = load_study(studies / "quick.yaml", seeds=[11, 12, 13])
    ladder = load_study(studies / "ladder_s1.yaml")
    assert set(quick.runs) <= set(ladder.runs)
    assert all(ladder.runs[name] == run for name, run in quick.runs.items())
    tokens = {c.total_steps * c.tokens_per_step for _, c in quick.runs.values()}
    assert len(tokens) == 1  # compared at equal tokens
    kept = find_runs(NOTEBOOKS.parent / "data" / "study" / "quick")
    assert {run.folder.name for run in kept} == set(quick.runs)


def test_parameter_names_are_those_of_the_tagged_cell():
    assert {"method", "more", "folder"} <= parameter_names(NOTEBOOKS / "02_run.ipynb")


def test_a_notebook_without_the_parameters_a_study_gives_is_refused(study_file):
    path = study_file(notebook="short")
    write_notebook(path.parent.parent / "short.ipynb", "seed = 0", "1")
    result = CliRunner().invoke(main, ["study", str(path), "--out", str(path.parent / "out")])
    assert result.exit_code == 2
    assert "short.ipynb: folder" in result.stderr
    assert not list(path.parent.rglob("*.log"))  # no kernel was started


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), (45, 45), ("0.5h", 1800)]
)
def test_time_limits_have_units(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3m", "0", "soon", "1.2.3s", "30 minutes", "inf"])
def test_a_time_limit_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="90s, 30m or 1h30m"):
        seconds_of(text)


def test_a_dry_run_says_what_each_run_needs_and_writes_nothing(study_file, tmp_path):
    path, out = study_file("1", seeds=[0, 1]), tmp_path / "out"
    arguments = ["study", str(path), "--out", str(out), "--dry-run"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert [run["state"] for run in facts["runs"]] == ["queued", "queued"]
    for run in facts["runs"]:
        assert 2**29 < run["memory_bytes"] < 2**30
        assert 2**20 < run["disk_bytes"] < 2**23
        assert run["memory_by"] == "formula"
    assert not out.exists()
    for job in plan_study(path, out=out).jobs:
        mark_done(job)
    table = CliRunner().invoke(main, arguments).stdout.splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["done", "done"]
    assert table[3].startswith("0 to run")


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_run_that_cannot_fit_is_refused_before_anything_starts(
    study_file, tmp_path, monkeypatch, what
):
    name, has = ("machine_memory", 10**8) if what == "memory" else ("free_disk", 10**5)
    monkeypatch.setattr(study if what == "memory" else plan, name, lambda *arguments: has)
    result = CliRunner().invoke(
        main, ["study", str(study_file("1")), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert "full-rank, seed 0" in line
    assert f"GB of {what}" in line
    assert not (tmp_path / "out").exists()


def test_a_study_whose_results_do_not_all_fit_on_the_disk_is_refused(
    study_file, tmp_path, monkeypatch
):
    path, out = study_file("1", seeds=[0, 1, 2]), tmp_path / "out"
    need = plan_study(path, out=out).needs[0]
    assert need.kept < need.disk
    monkeypatch.setattr(plan, "free_disk", lambda folder: need.disk + 2 * need.kept - 1)
    result = CliRunner().invoke(main, ["study", str(path), "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert "mine: all runs" in result.stderr
    assert "GB of disk" in result.stderr
    assert not out.exists()


def test_jobs_run_at_a_time_only_as_far_as_memory_reaches(study_file, tmp_path, monkeypatch):
    running, most, order = [], [], []

    def run_job(job, *arguments):
        running.append(job.memory)
        order.append(job.name)
        most.append(sum(running))
        time.sleep(0.05)
        running.remove(job.memory)
        job.state = "done"

    monkeypatch.setattr(running_jobs, "run_job", run_job)
    notebook = study_file("1").parent.parent / "short.ipynb"
    sizes = (6, 6, 3, 20, 3, 1)
    todo = [Job(f"{i}", tmp_path / f"{i}", notebook, {}, memory=m) for i, m in enumerate(sizes)]
    running_jobs.execute(todo, 4, False, lambda jobs: None, memory=10)
    assert {job.state for job in todo} == {"done"}
    assert max(m for m in most if m != 20) <= 10
    assert order.index("2") < order.index("1")  # a small one goes beside what runs
    assert most.count(20) == 1  # alone


def devices_of(monkeypatch, count, given=None):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    return running_jobs.cuda_devices()


def test_a_study_stays_on_the_cuda_devices_that_it_was_given(monkeypatch):
    assert devices_of(monkeypatch, 0) == []
    assert devices_of(monkeypatch, 2) == ["0", "1"]
    assert devices_of(monkeypatch, 2, "2, 3") == ["2", "3"]
    assert devices_of(monkeypatch, 2, "GPU-8f6d,MIG-11c2") == ["GPU-8f6d", "MIG-11c2"]
    assert devices_of(monkeypatch, 1, "5,-1,6") == ["5"]  # torch sees none after an invalid one
    assert devices_of(monkeypatch, 0, "") == []


def test_jobs_take_turns_on_devices_and_share_one_only_as_far_as_its_memory_reaches(
    study_file, tmp_path, monkeypatch
):
    devices_of(monkeypatch, 2, "4,GPU-7")
    running, most, seen = {}, {}, set()

    def run_job(job, environment, *arguments):
        device = environment["CUDA_VISIBLE_DEVICES"]
        seen.add(device)
        running.setdefault(device, []).append(job.device_memory)
        most[device] = max(most.get(device, 0), sum(running[device]))
        time.sleep(0.05)
        running[device].remove(job.device_memory)
        job.state = "done"

    monkeypatch.setattr(running_jobs, "run_job", run_job)
    notebook = study_file("1").parent.parent / "short.ipynb"
    sizes = (6, 6, 6, 3, 3, 4)
    todo = [
        Job(f"{i}", tmp_path / f"{i}", notebook, {}, device_memory=m) for i, m in enumerate(sizes)
    ]
    running_jobs.execute(todo, 4, False, lambda jobs: None, device_memory=10)
    assert {job.state for job in todo} == {"done"}
    assert seen == {"4", "GPU-7"}
    assert max(most.values()) <= 10
    assert min(most.values()) > 6  # some did share


HOSTILE = {
    "a notebook above the folder": ({"notebook": "../../secret"}, "notebook"),
    "a comparison above the folder": ({"compare": "../studies/../../secret"}, "compare"),
    "a notebook by its absolute path": ({"notebook": "/tmp/secret"}, "notebook"),
    "a notebook behind a link": ({"notebook": "link"}, "notebook"),
    "a notebook with a NUL": ({"notebook": "../\0secret"}, "notebook"),
    "a label of two lines": ({"variants": {"two\nlines": {}}}, "printable"),
    "a label that moves the cursor": ({"variants": {"\x1b[2J": {}}}, "printable"),
    "a label as long as a page": ({"variants": {"x" * 500: {}}}, "at most 80"),
    "a method that is a path": ({"base": {"method": "../../x"}}, "method"),
    "a model that is a path": ({"base": {"model": "../../x"}}, "model"),
}


@pytest.mark.parametrize("wrong", HOSTILE)
def test_a_hostile_study_file_is_refused_in_one_line(study_file, tmp_path, wrong):
    content, word = HOSTILE[wrong]
    path = study_file(**content)
    write_notebook(tmp_path / "secret.ipynb", PARAMETERS, "1")
    (path.parent.parent / "link.ipynb").symlink_to(tmp_path / "secret.ipynb")
    result = CliRunner().invoke(main, ["study", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert word in line
    assert not (tmp_path / "out").exists()


def test_yaml_that_would_run_code_is_refused(study_file, tmp_path):
    path = study_file()
    path.write_text(f"base: !!python/object/apply:os.system ['touch {tmp_path}/owned']")
    result = CliRunner().invoke(main, ["study", str(path)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "owned").exists()


def test_a_run_folder_that_is_a_link_to_elsewhere_is_refused(study_file, tmp_path):
    path, out, elsewhere = study_file("1"), tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / next(iter(load_study(path).runs))).symlink_to(elsewhere)
    result = CliRunner().invoke(main, ["study", str(path), "--out", str(out)])
    assert result.exit_code == 2
    assert "leads out of" in result.stderr
    assert not list(elsewhere.iterdir())


def test_a_relative_folder_of_results_is_the_callers(study_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (job,) = plan_study(study_file("1"), out=Path("out")).jobs
    assert job.parameters["folder"] == str(tmp_path / "out" / job.folder.name)


def test_a_study_that_was_moved_is_not_executed_again(study_file, tmp_path):
    path = study_file("1")
    mark_done(plan_study(path, out=tmp_path / "out").jobs[0])
    (tmp_path / "out").rename(tmp_path / "moved")
    assert [job.state for job in plan_study(path, out=tmp_path / "moved").jobs] == ["done"]


def test_the_terminal_shows_hostile_words_on_one_line_and_without_control(capsys):
    job = Job("<b>x</b>", Path("x"), Path("x"), {}, state="failed", error="a\n\x1b[2Jb")
    view = View()
    view.show([job])
    view.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line
    assert "<b>x</b>" in line
