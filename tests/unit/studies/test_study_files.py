"""The kept studies follow from their files, and compare what was tuned with the same settings."""

import pytest
from paths import NOTEBOOKS, ROOT

from lowrank_lab.runs.run import find_runs
from lowrank_lab.studies.study_file import load_study

KEPT = ROOT / "data" / "study"
NAMED = ["full-rank", "muon", "low-rank", "low-rank + refactor + reset", "low-rank + transport"]
# Rows of S2 and S3 that hypotheses need, or that tell what full rank's own tuning changes.
BESIDE = ["full-rank at beta2 0.95", "full-rank at 8.05e-4", "full-rank, 64 × 5"]
# Studies on seeds that are reported, and those in which their rates were tuned.
TUNED_BY = {
    "ladder_s1": ("rates_s1",),
    "ladder_s2": ("rates_s2", "beta2_s2"),
    "ladder_s3": ("rates_s3",),
    "ranks_s1": ("ranks_rates_s1", "rates_s1"),
    "others_s1": ("others_rates_s1", "rates_s1"),
}
# what tuning decides, or what is recorded
FREE = {"lr", "rest_lr", "seed", "eval_every", "test_tokens", "spectra_every", "spectra_layers",
        "checkpoint_every", "method_options"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(p.name for p in KEPT.iterdir() if p.is_dir()))
def test_a_kept_study_is_what_its_file_trains(name):
    runs = find_runs(KEPT / name)
    seeds = sorted({run.config.seed for run in runs}) if name == "quick" else None
    study = load_study(NOTEBOOKS / "studies" / f"{name}.yaml", seeds, corpora=False)
    assert {run.folder.name for run in runs} == set(study.runs)


def settings(config):
    """What must be equal in tuning and comparison, with the rate of the rest and option names."""
    rest = config.rest_lr or config.lr
    options = tuple(sorted(config.method_options))
    return {**config.model_dump(exclude=FREE), "rest": rest, "options": options}


@pytest.mark.parametrize("name", TUNED_BY)
def test_what_is_compared_was_tuned_with_the_same_settings(name):
    tuned = [settings(run.config) for folder in TUNED_BY[name] for run in find_runs(KEPT / folder)]
    for run in find_runs(KEPT / name):
        assert settings(run.config) in tuned, run.label


@pytest.mark.parametrize("name", sorted({name for names in TUNED_BY.values() for name in names}))
def test_rates_are_tuned_on_seeds_that_are_not_reported(name):
    assert {run.config.seed for run in find_runs(KEPT / name)} <= {0, 1}


@pytest.mark.parametrize("name", [*TUNED_BY, "techniques_s1"])
def test_rows_of_hypotheses_have_five_reported_seeds_and_all_others_three(name):
    seeds = {}
    for run in find_runs(KEPT / name):
        seeds.setdefault(run.label, []).append(run.config.seed)
    five = NAMED + BESIDE if name.startswith("ladder") else []
    for label, found in seeds.items():
        assert sorted(found) == [11, 12, 13, 14, 15][: 5 if label in five else 3], label


@pytest.mark.parametrize("name", [name for name in TUNED_BY if name.startswith("ladder")])
def test_a_size_has_twenty_tokens_per_parameter_of_its_full_rank_model(name):
    runs = find_runs(KEPT / name)
    (parameters,) = {run.result["parameters"] for run in runs if run.label == "full-rank"}
    for run in runs:
        tokens = run.config.steps * run.config.tokens_per_step
        assert tokens / parameters == pytest.approx(20, rel=0.005), run.label


def test_ranks_at_the_ladders_rank_and_width_are_the_ladders_runs():
    ladder = {run.folder.name for run in find_runs(KEPT / "ladder_s1")}
    shared = [
        run.folder.name
        for run in find_runs(KEPT / "ranks_s1")
        if run.config.size.hidden_size == 48 and run.config.rank in (12, None)
    ]
    assert len(shared) == 12
    assert set(shared) <= ladder
