"""The command line does what the README says."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from paths import NOTEBOOKS

from lowrank_lab import config as config_module
from lowrank_lab.cli import main
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.own import OWN_METHODS
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.runs.run import Run
from lowrank_lab.studies.study_file import load_study
from lowrank_lab.training import step

SMALL = ["--model", "tiny", "--sequence-length", "16", "--batch", "2", "--vocab-size", "300"]
SMALL += ["--eval-tokens", "64", "--test-tokens", "64"]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_corpus):
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["train", *SMALL, "--corpus", text_corpus, "--steps", "12", "--out", str(folder)]
    arguments += ["--method", "low-rank", "--rank", "4", "--refactor-every", "4", "--label", "mine"]
    return CliRunner().invoke(main, arguments), folder


def test_train_writes_a_run_folder_and_says_where(trained):
    result, folder = trained
    assert result.exit_code == 0, result.output
    assert str(folder) in result.stdout
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(isinstance(row["loss"], float) for row in rows)
    assert Run(folder).label == "mine"


def test_every_field_of_the_configuration_is_a_flag():
    text = run("train", "--help").output
    for name in RunConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def test_options_of_a_method_are_given_by_name(tmp_path, text_corpus):
    arguments = ["train", *SMALL, "--corpus", text_corpus, "--steps", "2", "--method", "galore"]
    done = run(
        *arguments, "--option", "scale=1e-1", "--option", "proj_type=left", "--out", tmp_path
    )
    assert done.exit_code == 0, done.output
    options = Run(tmp_path).config.method_options
    assert (options["scale"], options["proj_type"], options["update_proj_gap"]) == (
        0.1,
        "left",
        200,
    )


def test_sample_goes_on_with_a_prompt(trained):
    done = run("sample", trained[1], "--prompt", "the model", "--tokens", "5")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("the model")


def test_report_prints_the_table_as_json_too(trained, tmp_path):
    done = run("report", trained[1], "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert [row["label"] for row in json.loads(done.stdout)] == ["mine"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_kept_study_is_reported_with_its_questions_and_stays_as_it_is(tmp_path, monkeypatch):
    here = NOTEBOOKS.parent / "data" / "study" / "ladder_s2"
    shutil.copytree(here, tmp_path / "study" / "ladder_s2")
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path))
    before = sorted((tmp_path / "study").rglob("*"))
    done = run("report", tmp_path / "study" / "ladder_s2")
    assert done.exit_code == 0, done.output
    assert "p (A < B)" in done.stdout
    assert run("report", tmp_path / "study").exit_code == 0  # all that is kept as one
    assert sorted((tmp_path / "study").rglob("*")) == before
    page = tmp_path / "runs" / "kept" / "ladder_s2" / "report.html"
    assert "Is A below B?" in page.read_text()


def test_data_says_what_is_in_a_corpus(text_corpus):
    done = run("data", "--corpus", text_corpus, "--vocab-size", "byte", "--json")
    facts = json.loads(done.stdout)
    assert facts["vocab_size"] == 257
    assert facts["tokens"]["train"] > facts["tokens"]["test"] > 0


def test_methods_draws_the_family_tree_with_year_states_and_use():
    lines = run("methods").stdout.splitlines()
    fira = next(line for line in lines if "fira" in line)
    assert re.fullmatch(r"│  ├─ fira +2024  2r·max\(m,n\) \+ r·min\(m,n\) \+ 1 +GaLore's .+", fira)
    assert max(map(len, lines)) <= 120


def test_methods_with_names_tells_all_of_these():
    text = run("methods", "galore", "low-rank").stdout
    for word in ("galore: dense", "arXiv 2505.22922", "2r(m+n)", "    update_proj_gap 200\n"):
        assert word in text
    assert "fira" not in text.splitlines()[0]
    done = run("methods", "galor")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].endswith("did you mean 'galore'?")


def test_work_that_fails_ends_with_status_1_and_one_line(tmp_path, text_corpus, monkeypatch):
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(step, "gradients", lambda *arguments: (nan, nan))
    done = run("train", *SMALL, "--corpus", text_corpus, "--steps", 9, "--out", tmp_path)
    assert done.exit_code == 1, done.output
    line = done.stderr.splitlines()[-1]
    assert "is kept in" in line
    assert "Traceback" not in done.output


def test_no_arguments_shows_help():
    done = run()
    assert done.exit_code == 0
    assert "Commands:" in done.output


def test_a_file_of_ones_own_methods_is_known_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv(OWN_METHODS, "")
    file = tmp_path / "own.py"
    file.write_text("import lowrank_lab as lab\nlab.register_method('mine', defaults={'gap': 3})\n")
    try:
        done = run("--methods-from", file, "methods", "--json")
        assert done.exit_code == 0, done.output
        (row,) = [row for row in json.loads(done.stdout) if row["name"] == "mine"]
        assert row["options"]["gap"] == 3
        kernels = subprocess.run(  # what a notebook of a study sees
            [sys.executable, "-c", "import lowrank_lab as lab; assert 'mine' in lab.METHODS"],
            env={**os.environ},
        )
        assert kernels.returncode == 0
    finally:
        METHODS.pop("mine", None)


def test_earlier_flags_still_work_and_warn_in_one_line():
    memory = ["memory", "--model", "tiny", "--batch", "2", "--sequence-length", "16", "--json"]
    flags = ["--ranks", "2", "--checkpoints-kept", "5", "--keep-checkpoints"]
    earlier = subprocess.run(
        [sys.executable, "-m", "lowrank_lab", *memory, *flags], capture_output=True, text=True
    )
    assert earlier.stderr.splitlines() == [
        "--ranks is called --world-size now",
        "checkpoints_kept is called keep_latest now",
        "keep_checkpoints is called keep_after_finish now",
    ]
    now = run(*memory, "--world-size", "2", "--keep-latest", "5", "--keep-after-finish")
    assert now.stderr == ""
    facts = json.loads(earlier.stdout)
    assert facts["world_size"] == 2
    assert {**facts, "seconds": 0} == {**json.loads(now.stdout), "seconds": 0}
    assert "--ranks" not in run("memory", "--help").stdout


def test_a_study_file_with_earlier_names_has_the_same_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "_warned", set())
    studies = {"earlier": "checkpoints_kept", "now": "keep_latest"}
    for name, field in studies.items():
        base = f"base: {{model: tiny, corpus: markov, steps: 20, {field}: 5}}\nseeds: [1]\n"
        (tmp_path / f"{name}.yaml").write_text(base)
    with pytest.warns(FutureWarning, match="keep_latest"):
        earlier = load_study(tmp_path / "earlier.yaml", corpora=False)
    assert earlier.runs == load_study(tmp_path / "now.yaml", corpora=False).runs
