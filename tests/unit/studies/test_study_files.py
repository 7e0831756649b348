"""The files of the study (data/study/README.md) follow from one another."""

import math
import re

import pandas as pd
import pytest
from paths import NOTEBOOKS

from lowrank_lab.analysis.tables import claims, summary
from lowrank_lab.report import asked_in
from lowrank_lab.runs.files import write_json
from lowrank_lab.runs.run import final_table, find_runs, load_runs
from lowrank_lab.studies.study_file import load_study

CHAIN = ("tune_short", "tune", "main", "techniques", "ranks", "ranks_rates", "tune_ranks")
# the fields that tuning decides or that only say what is recorded
FREE = {"lr", "seed", "steps", "eval_every", "test_tokens", "spectra_every", "spectra_layers",
        "checkpoint_every"}  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Runs of every file, label and configuration, if each method's middle rate were its best."""
    data = tmp_path_factory.mktemp("data")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_LAB_DATA", str(data))
        for name in CHAIN:
            study = load_study(NOTEBOOKS / "studies" / f"{name}.yaml", corpora=False)
            found[name] = list(study.runs.values())
            rates = {}
            for label, config in found[name]:
                rates.setdefault(label.partition(",")[0], set()).add(config.lr)
            for run_id, (label, config) in study.runs.items():
                tried = sorted(rates[label.partition(",")[0]])
                middle = tried[(len(tried) - 1) // 2] if len(tried) < 5 else tried[len(tried) // 2]
                loss = abs(math.log(config.lr / middle))
                folder = data / "runs" / name / run_id
                folder.mkdir(parents=True)
                write_json(folder / "config.json", {"config": config.model_dump()})
                write_json(folder / "result.json", {"validation_loss": loss})
    return found


KEPT = NOTEBOOKS.parent / "data" / "study"
# Rows of S2 that are not tuned yet: their part of the file has nothing to choose from.
PARTS = {"ladder_s2": ["full-rank", "muon", "low-rank", "low-rank + refactor + reset",
                       "low-rank + transport"]}  # fmt: skip
EXTENDED = {"tune": 3}  # runs of grids that were extended by hand, as data/study/README.md says


@pytest.mark.parametrize("name", sorted(p.name for p in KEPT.iterdir() if p.is_dir()))
def test_a_kept_study_is_what_its_file_trains(name):
    runs = find_runs(KEPT / name)
    seeds = sorted({run.config.seed for run in runs}) if name == "quick" else None
    study = load_study(
        NOTEBOOKS / "studies" / f"{name}.yaml", seeds, PARTS.get(name, ()), corpora=False
    )
    lost = {run.folder.name for run in runs} - set(study.runs)
    assert len(lost) == EXTENDED.get(name, 0), lost


def variants(runs):
    """label without its grid → one configuration."""
    return {label.partition(",")[0]: config for label, config in runs}


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("tune_short", "tune"),
        ("tune", "main"),
    ],
)
def test_what_is_compared_was_tuned_with_the_same_settings(chain, earlier, later):
    before, after = variants(chain[earlier]), variants(chain[later])
    assert set(before) == set(after)
    for label, config in after.items():
        left = FREE | {"method_options"}
        assert config.model_dump(exclude=left) == before[label].model_dump(exclude=left), label
        assert set(config.method_options) == set(before[label].method_options), label


def test_no_seed_that_was_tuned_on_is_compared(chain):
    for name, runs in chain.items():
        seeds = {config.seed for _, config in runs}
        assert seeds == {0} if name.startswith("tune") else 0 not in seeds, name


def test_a_headline_has_five_seeds_and_every_row_of_the_comparison_three(chain):
    counts = {}
    for label, _ in chain["main"]:
        counts[label] = counts.get(label, 0) + 1
    five = {"full-rank", "low-rank", "low-rank + refactor + reset", "galore", "fira", "sltrain",
            "sltrain + refactor + reset"}  # fmt: skip
    assert {label for label, n in counts.items() if n == 5} == five
    assert {n for label, n in counts.items() if label not in five} == {3}


def test_all_lengths_are_twenty_tokens_a_parameter(chain):
    for name in ("main", "techniques"):
        full = next(c for _, c in chain[name] if c.method == "full-rank")
        size = full.size
        layer = 4 * size.hidden_size**2 + 3 * size.hidden_size * size.intermediate_size
        count = 2 * size.vocab_size * size.hidden_size + size.num_layers * layer
        for _, config in chain[name]:
            assert config.steps * config.tokens_per_step / count == pytest.approx(20, rel=0.01)


def section(title):
    """A section of the book's page on the study."""
    page = (NOTEBOOKS.parent / "docs" / "explanation" / "first-study.md").read_text()
    return page.partition(f"\n## What {title} shows")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("name", "title"),
    [("main", "the study"), ("quick", "the quick study")],
)
def test_the_tables_of_the_book_are_what_the_kept_records_say(name, title):
    part = section(title).partition("\n### ")[0].partition("\n| A − B |")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    told = {line[0]: line[-4:] for line in lines[1:]}
    table = summary(final_table(load_runs(NOTEBOOKS.parent / "data" / "study" / name)))
    assert list(told) == list(table["label"])
    for row in table.to_dict("records"):
        loss, perplexity, weights, states = told[row["label"]]
        assert loss == f"{row['test loss']:.3f} ± {row['±']:.3f}"
        assert perplexity == f"{row['test perplexity']:.2f}"
        trained = f"{row['parameters']:,}"
        if not weights.endswith(f", {trained} of them trained"):  # beside LoRA's frozen ones
            assert weights == f"{trained} ({row['without embeddings']:,})"
        mib = row["weights + states (MiB)"], row["without embeddings (MiB)"]
        assert states == f"{mib[0]:.2f} MiB ({mib[1]:.2f})"


def claimed(name):
    """What a study asks and its kept records answer."""
    _, pairs = asked_in(NOTEBOOKS / "studies" / f"{name}.yaml")
    return claims(final_table(load_runs(NOTEBOOKS.parent / "data" / "study" / name)), pairs)


STUDIES = {
    "the study": ["main", "techniques"],
    "the quick study": ["quick"],
}


@pytest.mark.parametrize("title", STUDIES)
def test_every_difference_of_the_book_is_an_answer_to_what_a_study_asks(title):
    text = "\n".join(x for x in section(title).splitlines() if not re.search(r"MiB \(", x))
    answers = pd.concat([claimed(name) for name in STUDIES[title]])
    differences = set()  # with the sign of A − B, or without one
    for mean, width in zip(answers["A − B"], answers["±"], strict=True):
        size = f"{abs(mean):.3f} ± {width:.3f}"
        differences |= {size, "−" + size, "+" + size}
    shown = set(re.findall(r"[−+]?\d\.\d+ ± \d\.\d+", text))
    assert shown
    assert shown <= differences
    below = [min(p, 1 - p) for p in answers["p (A < B)"]]
    rounded = {float(f"{p:.{digits}g}") for p in below for digits in (1, 2)}
    assert {float(p) for p in re.findall(r"\bp (0\.\d+)", text)} <= rounded


@pytest.mark.parametrize("title", STUDIES)
def test_a_row_of_differences_has_the_sign_and_the_seeds_of_the_records(title):
    found = re.findall(
        r"^\| (\S.*?) − (\S.*?) \| ([−+]\S+) ± (\S+) \|(?: (\d) \|)?", section(title), re.M
    )
    assert found
    answers = pd.concat([claimed(name) for name in STUDIES[title]])
    known = {}
    for a, b, mean, width, n in answers[["A", "B", "A − B", "±", "n"]].to_numpy():
        for pair, sign in (((a, b), 1), ((b, a), -1)):
            known.setdefault(pair, []).append((f"{sign * mean:+.3f}", f"{width:.3f}", str(n)))
    for a, b, mean, width, n in found:
        a, b = (x.replace(" with both", " + refactor + reset") for x in (a, b))
        records = known[a, b]
        assert (mean.replace("−", "-"), width) in [r[:2] for r in records], (a, b)
        assert not n or n in [r[2] for r in records], (a, b)
