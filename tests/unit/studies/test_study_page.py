"""The numbers of the chapter on the study (docs/explanation/study.md) are those of the records."""

import re

import pytest
from paths import NOTEBOOKS, ROOT

from lowrank_lab.analysis.costs import COSTS, at_equal_cost, costs_of
from lowrank_lab.analysis.ladder import gap_table, gaps_of
from lowrank_lab.analysis.rates import robustness
from lowrank_lab.analysis.tables import claims, structure
from lowrank_lab.config import RunConfig
from lowrank_lab.figures import cosine_table
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.report import asked_in
from lowrank_lab.runs.run import complete_runs, final_table, finals_of, load_runs, momentum_of

KEPT = ROOT / "data" / "study"
SIZES = {"S1": KEPT / "ladder_s1", "S2": KEPT / "ladder_s2"}
PAGE = " ".join((ROOT / "docs" / "explanation" / "study.md").read_text().split())
INTERVAL = re.compile(r"[+−]\d\.\d+ ± \d\.\d+")


def shown(mean, half_width):
    return f"{mean:+.3f} ± {half_width:.3f}".replace("-", "−")


def pairs_of(folder):
    return asked_in(NOTEBOOKS / "studies" / f"{folder.name}.yaml")[1]


@pytest.fixture(scope="module")
def answers():
    """By size: A − B of each pair, gaps by label."""
    finals = {size: final_table(load_runs(folder)) for size, folder in SIZES.items()}
    gaps = gap_table(gaps_of(SIZES.values()))
    parameters = sorted(gaps["parameters"].unique())
    found = {}
    for (size, folder), number in zip(SIZES.items(), parameters, strict=True):
        asked = claims(finals[size], pairs_of(folder)).dropna(subset=["±"])
        of_pairs = {(row["A"], row["B"]): shown(row["A − B"], row["±"])
                    for row in asked.to_dict("records")}  # fmt: skip
        of_gaps = {row["label"]: shown(row["gap"], row["±"])
                   for row in gaps[gaps["parameters"] == number].to_dict("records")}  # fmt: skip
        found[size] = of_pairs, of_gaps
    return found


def test_every_interval_is_a_gap_an_answer_or_a_difference_at_equal_cost(answers):
    costs = costs_of(SIZES.values())
    tables = [at_equal_cost(costs, cost) for cost in COSTS]
    known = {shown(row["A − dense"], row["±"]) for t in tables for row in t.to_dict("records")}
    for of_pairs, of_gaps in answers.values():
        known |= {*of_pairs.values(), *of_gaps.values()}
    stated = set(INTERVAL.findall(PAGE))
    assert len(stated) > 15
    assert stated <= known


def test_the_techniques_table_has_each_size_in_its_column(answers):
    both, transport = "low-rank + refactor + reset", "low-rank + transport"
    rows = {
        "low-rank with refactorization and reset − low-rank": (both, "low-rank"),
        "low-rank with transport − low-rank": (transport, "low-rank"),
        "low-rank with transport − with refactorization and reset": (transport, both),
    }
    for words, pair in rows.items():
        cells = [answers[size][0][pair] for size in SIZES]
        assert f"| {words} | {' | '.join(cells)} |" in PAGE


def test_rows_at_S1_have_their_gaps_and_their_shares_of_bytes(answers):
    costs = costs_of(SIZES.values())
    costs = costs[costs["parameters"] == costs["parameters"].min()]
    held = costs.groupby("label")["bytes"].mean()
    labels = re.findall(r"\| ([\w-]+) \| (\d+ %) \| (\S+ ± \S+) \|", PAGE)
    assert len(labels) == 8
    for label, share, gap in labels:
        assert share == f"{held[label] / held['full-rank']:.0%}".replace("%", " %")
        assert gap == answers["S1"][1][label]


def test_gaps_in_sentences_belong_to_their_rows_and_sizes(answers):
    for label, words in (
        ("low-rank", "ends {} above full rank at S1 and {} at S2"),
        ("muon", "Muon ends {} below AdamW at S1 and {} at S2"),
    ):
        assert words.format(*(answers[size][1][label] for size in SIZES)) in PAGE
    fira = answers["S1"][0]["fira", "galore"]
    assert f"Fira less GaLore is {fira}" in PAGE
    costs = costs_of(SIZES.values())
    by_cost = [at_equal_cost(costs, cost).set_index(["label", "parameters"]) for cost in COSTS]
    of_bytes, of_flops = (t.loc[("low-rank", 266_816)] for t in by_cost)
    assert f"low-rank is {shown(*of_flops[['A − dense', '±']])} above it" in PAGE
    assert f"(low-rank is {shown(*of_bytes[['A − dense', '±']])} below it)" in PAGE
    held = costs.groupby(["label", "parameters"])["bytes"].mean()
    for label, words in (("low-rank", "It needs {} and {} of"), ("muon", "with {} and {} of its")):
        shares = [f"{held[label, n] / held['full-rank', n]:.0%}".replace("%", " %")
                  for n in (132_432, 266_816)]  # fmt: skip
        assert words.format(*shares) in PAGE


def test_what_the_techniques_do_to_factors_and_moments_is_recorded():
    runs = complete_runs(SIZES["S2"])
    ends = structure(runs).set_index("label")
    plain, both = ends.loc["low-rank"], ends.loc["low-rank + refactor + reset"]
    condition = [(row["condition B"] + row["condition A"]) / 2 for row in (plain, both)]
    assert "falls from {:.1f} to {:.1f}".format(*condition) in PAGE
    imbalance = plain["imbalance"], both["imbalance"]
    assert "their imbalance from {:.2f} to {:.2f}".format(*imbalance) in PAGE
    factor = (1 + imbalance[0]) / (1 - imbalance[0])
    assert f"{imbalance[0]:.2f} is what a factor of {factor:.1f}" in PAGE
    finals = finals_of(runs, SIZES["S2"])
    cosines = cosine_table(finals, momentum_of(runs), pairs_of(SIZES["S2"])).set_index("A")
    transport = cosines.loc["low-rank + transport", "cosine"]
    assert f"has a cosine of {transport:.2f} with the one before under transport" in PAGE
    assert cosines.loc["low-rank + refactor + reset", "cosine"] == 0


def test_how_far_a_rate_may_be_off_is_that_of_the_tuning_runs():
    table = robustness(final_table(load_runs(KEPT / "rates_s1")))
    best = table.assign(row=table["label"].str.partition(",")[0]).drop_duplicates("row")
    best = best.set_index("row")
    muon, adamw = best.loc["muon"], best.loc["full-rank"]
    assert (
        f"Muon's rate may be {muon['down']:.2f} times too low or {muon['up']:.2f} times too high, "
        f"AdamW's {adamw['down']:.2f} or {adamw['up']:.2f}."
    ) in PAGE


def test_gigabytes_at_1b_are_those_of_the_formulas():
    sizes, gradients = {}, {}
    for method in ("full-rank", "muon", "frugal", "fira", "low-rank", "scale"):
        rank = {} if method in ("full-rank", "muon", "scale") else {"rank": 512}
        found = by_formula(
            resolve(RunConfig(model="1b", precision="bf16", method=method, steps=10**6, **rank))
        )
        sizes[method] = f"{(found.weights + found.optimizer_states) / 1e9:.2f}"
        gradients[method] = f"{found.gradients / 1e9:.2f}"
    assert sizes["frugal"] == sizes["fira"]
    assert (
        "take {full-rank} GB with AdamW, {muon} with Muon, {fira} with FRUGAL or Fira, {low-rank} "
        "with low-rank and {scale} with SCALE;".format(**sizes)
    ) in PAGE
    assert "gradients add {fira}, with low-rank {low-rank}.".format(**gradients) in PAGE
