"""The README is short, its code and commands work, and its numbers are those of the records."""

import re
import shlex

import pandas as pd
import pytest
from paths import NOTEBOOKS, ROOT, extension_module

import lowrank_lab as lab
from lowrank_lab.analysis.ladder import gap_table, gaps_of
from lowrank_lab.analysis.tables import claims, summary
from lowrank_lab.cli import main
from lowrank_lab.config import SIZES
from lowrank_lab.figures import cosine_table
from lowrank_lab.models.llama import Llama
from lowrank_lab.report import asked_in
from lowrank_lab.runs.run import complete_runs, final_table, finals_of, momentum_of

README = (ROOT / "README.md").read_text()
BOOK = "build/docs/notebooks/"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
COMMANDS = re.findall(r"^    (?:torchrun .*-m )?lowrank[-_]lab (.+?)(?:  +#.*)?$", README, re.M)


def test_a_stranger_can_read_it_in_three_minutes():
    assert len(README.splitlines()) <= 190


def test_its_first_ten_lines_of_python_train_a_model(text_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[0]
    assert len(code.splitlines()) <= 12
    small = {
        'model="micro"': f'model="tiny", corpus="{text_corpus}"',
        "vocab_size=512": "vocab_size=300, eval_tokens=64, test_tokens=64",
        "rank=16": "rank=4, sequence_length=32, batch=2",
        "steps=200": "steps=60",
    }
    for usual, quick in small.items():
        assert usual in code
        code = code.replace(usual, quick)
    names = {}
    exec(code, names)
    assert names["run"].finished
    assert sorted(set(names["table"]["label"])) == [
        "galore + reset",
        "low-rank + spectral + refactor + reset",
    ]


def test_its_layers_optimizers_and_techniques_work_on_a_model():
    model, dense_model = Llama(SIZES["mini"]), Llama(SIZES["mini"])
    optimizer = lab.optim.GaLore(model.parameters(), lr=0.1)
    names = {"lab": lab, "model": model, "dense_model": dense_model, "optimizer": optimizer}
    exec(BLOCKS[1], names)
    assert isinstance(names["optimizer"], lab.optim.GaLore)
    assert len(names["optimizer"].param_groups) == 2


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_are_understood(line):
    words = shlex.split(line, comments=True)
    command = main.commands[words[0]]
    command.make_context(words[0], words[1:])  # raises on an unknown flag or value


def test_it_begins_with_the_two_commands_that_a_person_can_run():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^    )make ([\w-]+)", README, re.M)
    assert named[:2] == ["study", "lab"]
    assert {"test", "test-all", "docs", "bench"} <= set(named) <= targets


def test_files_and_chapters_that_it_links_to_exist():
    """Chapters are in build/docs once `make docs` has run; there is one per notebook."""
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)]
    chapters = [link for link in links if link.startswith(BOOK)]
    files = [link for link in links if "://" not in link and link not in chapters]
    assert not [link for link in files if not (ROOT / link).exists()]
    notebooks = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert [link.removeprefix(BOOK).removesuffix(".html") for link in chapters] == notebooks


def test_its_methods_are_those_of_the_library():
    part = README.partition("## Methods")[2].partition("\nOur ")[0]
    named = set(re.findall(r"`([\w-]+)`", part))
    assert len(named) >= 15
    assert named <= set(lab.METHODS)


def test_its_table_is_what_the_kept_records_say():
    lines = [line.strip("| ").split(" | ") for line in README.splitlines() if " MiB |" in line]
    assert 0 < len(lines) <= 8
    finals = final_table(lab.load_runs(ROOT / "data" / "study" / "ladder_s1"))
    table = summary(finals).set_index("label")
    for label, n, loss, perplexity, size in lines:
        row = table.loc[label]
        assert int(n) == row["n"]
        assert loss == f"{row['test loss']:.3f} ± {row['±']:.3f}"
        assert perplexity == f"{row['test perplexity']:.2f}"
        assert size == f"{row['weights + states (MiB)']:.2f} MiB"


def test_every_difference_that_it_states_is_an_answer_to_what_a_study_asks():
    answers = []
    sizes = ("ladder_s1", "ladder_s2", "ladder_s3")
    for name in (*sizes, "others_s1"):
        _, pairs = asked_in(NOTEBOOKS / "studies" / f"{name}.yaml")
        if name == "ladder_s1":
            pairs += [("scale", "low-rank"), ("frugal", "full-rank"), ("fira", "full-rank")]
        if name == "ladder_s2":
            pairs += [("ldadam", "full-rank at beta2 0.95")]
        answers.append(claims(final_table(lab.load_runs(ROOT / "data" / "study" / name)), pairs))
    found = pd.concat(answers)
    known = {f"{m:+.3f} ± {w:.3f}" for m, w in zip(found["A − B"], found["±"], strict=True)}
    gaps = gap_table(gaps_of(ROOT / "data" / "study" / name for name in sizes))
    known |= {f"{m:+.3f} ± {w:.3f}" for m, w in zip(gaps["gap"], gaps["±"], strict=True)}
    compared = ("ladder_s1", "others_s1", "ranks_s1")
    at_equal_bytes = extension_module("cost_tables").at_equal_bytes(*compared)
    known |= {f"{m:+.3f} ± {w:.3f}" for m, w in at_equal_bytes[["A − dense", "±"]].to_numpy()}
    findings = " ".join(README.partition("## Findings")[2].partition("| method")[0].split())
    stated = set(re.findall(r"[+−]?\d\.\d+ ± \d\.\d+", findings))
    assert stated
    assert {difference.replace("−", "-") for difference in stated} <= known


def test_the_shares_of_full_rank_s_bytes_that_it_states_are_those_of_the_records():
    studies = [ROOT / "data" / "study" / name for name in ("ladder_s1", "others_s1")]
    finals = pd.concat([final_table(lab.load_runs(study)) for study in studies])
    held = finals["weight_bytes"] + finals["optimizer_state_bytes"]
    held = held.groupby(finals["label"]).mean()
    shares = {label: f"{size / held['full-rank']:.0%}".replace("%", " %") for label, size in
              held.items()}  # fmt: skip
    findings = README.partition("## Findings")[2].partition("| method")[0]
    rows = [line.strip("| ").split(" | ") for line in findings.splitlines() if " | " in line][1:]
    stated = {row[0].replace("AdamW in 8 bits", "adamw-8bit").lower(): row[1] for row in rows}
    assert stated.keys() == {"muon", "ldadam", "adamw-8bit", "frugal", "fira", "scale", "low-rank"}
    assert stated == {label: shares[label] for label in stated}
    findings = " ".join(findings.split())
    assert "FRUGAL and Fira (72 % of its bytes) and AdamW in 8 bits (62 %)" in findings
    assert "AdamW** at 79 %, 75 % and 72 % of its bytes" in findings  # as in test_study_page.py


def test_the_table_of_gaps_has_each_size_and_difference_at_equal_bytes_in_its_column():
    study = ROOT / "data" / "study"
    first, second = (
        pd.concat(gap_table(gaps_of([study / name])) for name in names).set_index("label")
        for names in (("others_s1", "ladder_s1"), ("ladder_s2",))
    )
    dense = extension_module("cost_tables").at_equal_bytes("ladder_s1", "others_s1", "ranks_s1")
    columns = (first, "gap"), (second, "gap"), (dense.set_index("label"), "A − dense")
    for name in ("Muon", "LDAdam", "AdamW in 8 bits", "FRUGAL", "Fira", "SCALE", "low-rank"):
        label = name.replace("AdamW in 8 bits", "adamw-8bit").lower()
        cells = [
            "{:+.3f} ± {:.3f}".format(*table.loc[[label], [mean, "±"]].to_numpy()[-1])
            if label in table.index
            else "–"
            for table, mean in columns
        ]
        (line,) = re.findall(rf"   \| {name} \| \d\d % \| (.*) \|\n", README)
        assert line.split(" | ") == [cell.replace("-", "−") for cell in cells], name


def test_its_methods_are_trained_at_the_first_size_as_it_says():
    studies = [ROOT / "data" / "study" / name for name in ("ladder_s1", "others_s1")]
    trained = {run.config.method for study in studies for run in complete_runs(study)}
    assert trained == set(lab.METHODS)
    assert "trained with all of the methods below" in " ".join(README.split())


def test_the_cosines_that_it_states_are_those_of_the_records():
    folder = ROOT / "data" / "study" / "ladder_s1"
    runs = complete_runs(folder)
    _, pairs = asked_in(NOTEBOOKS / "studies" / "ladder_s1.yaml")
    table = cosine_table(finals_of(runs, folder), momentum_of(runs), pairs)
    table = table.drop_duplicates("A").set_index("A")
    shown = [f"{table.loc[label, 'cosine']:.2f}" for label in
             ("low-rank + transport", "low-rank + refactor")]  # fmt: skip
    words = "the cosine of Adam's direction across it is {}, and {} if moments are kept"
    assert words.format(*shown) in " ".join(README.split())


def test_the_verdicts_on_hypotheses_that_it_states_are_those_of_the_registered_tests():
    table = extension_module("hypotheses").hypotheses()
    findings = " ".join(README.partition("## Findings")[2].partition("| method")[0].split())
    assert set(table["verdict"]) == {"not shown"}
    p = [f"{value:.2g}" for value in table["p (Holm)"]]
    assert f"at the third (registered: p {p[0]})" in findings
    assert f"(registered: p {p[1]}). Minus plain low-rank" in findings
    assert f"not shown (registered: p {p[2]}, {p[3]})" in findings
    dense = table.iloc[4]
    stated = f"{dense['estimate']:+.3f} ± {dense['±']:.3f}, registered: p {p[4]}"
    assert f"on the same tokens ({stated})." in findings
    widths = table["±"].iloc[[0, 1, 4]]
    assert f"have intervals of ±{widths.min():.2f} to ±{widths.max():.2f}." in findings
