"""The numbers of the chapter on the study (docs/explanation/study.md) are those of the records."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from paths import NOTEBOOKS, ROOT, extension_module

from lowrank_lab.analysis.costs import COSTS, at_equal_cost, costs_of
from lowrank_lab.analysis.ladder import extrapolation_table, gap_table, gaps_of
from lowrank_lab.analysis.linear_teacher import start, teacher
from lowrank_lab.analysis.rates import lowest_point, robustness
from lowrank_lab.analysis.stats import corrected
from lowrank_lab.analysis.tables import claims, paired, structure, verdicts
from lowrank_lab.config import RunConfig
from lowrank_lab.figures import cosine_table
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.report import asked_in
from lowrank_lab.runs.run import complete_runs, final_table, finals_of, load_runs, momentum_of

KEPT = ROOT / "data" / "study"
SIZES = {size: KEPT / f"ladder_{size.lower()}" for size in ("S1", "S2", "S3")}
OTHERS = KEPT / "others_s1"  # more rows at S1
LENGTH = KEPT / "length"  # rows of S1 on other numbers of tokens
PAGE = " ".join((ROOT / "docs" / "explanation" / "study.md").read_text().split())
LADDER = " ".join((ROOT / "docs" / "results" / "ladder.md").read_text().split())
INTERVAL = re.compile(r"[+−]\d\.\d+ ± \d\.\d+")
TECHNIQUES = ("low-rank + refactor + reset", "low-rank + transport")


def shown(mean, half_width, digits=3):
    return f"{mean:+.{digits}f} ± {half_width:.{digits}f}".replace("-", "−")


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
        of_pairs = answers_to(pairs_of(folder), finals[size])
        found[size] = of_pairs, of_rows(gaps[gaps["parameters"] == number])
    of_pairs, of_gaps = found["S1"]
    others = answers_to(pairs_of(OTHERS), final_table(load_runs(OTHERS)))
    found["S1"] = others | of_pairs, of_rows(gap_table(gaps_of([OTHERS]))) | of_gaps
    return found


def answers_to(pairs, finals):
    asked = claims(finals, pairs).dropna(subset=["±"]).to_dict("records")
    return {(row["A"], row["B"]): shown(row["A − B"], row["±"]) for row in asked}


def of_rows(gaps):
    return {row["label"]: shown(row["gap"], row["±"]) for row in gaps.to_dict("records")}


@pytest.fixture(scope="module")
def at_equal_bytes():
    """By row of S1: minus a dense model of its bytes of weights and states, on the same tokens."""
    found = extension_module("cost_tables").at_equal_bytes("ladder_s1", "others_s1", "ranks_s1")
    return found.set_index("label")[["A − dense", "±"]]


def test_every_interval_is_a_gap_an_answer_or_a_difference_at_equal_cost(answers, at_equal_bytes):
    costs = costs_of(SIZES.values())
    tables = [at_equal_cost(costs, cost) for cost in COSTS]
    known = {shown(row["A − dense"], row["±"]) for t in tables for row in t.to_dict("records")}
    for of_pairs, of_gaps in answers.values():
        known |= {*of_pairs.values(), *of_gaps.values()}
    trends = extrapolation_table(gaps_of(SIZES.values()), 60e6)
    known |= {shown(*row) for row in trends[["slope", "±"]].to_numpy()}
    known |= {shown(*row) for row in at_equal_bytes.to_numpy()}
    known |= {shown(*row, digits=2) for row in trends[["predicted", "± predicted"]].to_numpy()}
    longer = answers_to(pairs_of(LENGTH), final_table(load_runs(LENGTH)))
    beside = answers_to(
        [("ldadam", "full-rank at beta2 0.95")], final_table(load_runs(SIZES["S2"]))
    )
    known |= {*longer.values(), *beside.values()}
    stated = set(INTERVAL.findall(PAGE))
    assert len(stated) > 15
    assert stated <= known


def test_gaps_on_four_times_the_tokens_are_those_of_their_runs():
    longer = answers_to(pairs_of(LENGTH), final_table(load_runs(LENGTH)))
    muon, low_rank = (longer[row, "full-rank, 80"] for row in ("muon, 80", "low-rank, 80"))
    assert f"{muon} of Muon, {low_rank} of low-rank" in PAGE


def test_trends_and_what_lines_say_at_60_M_are_those_of_the_gaps():
    table = extrapolation_table(gaps_of(SIZES.values()), 60e6).set_index("label")
    ends = table[["predicted", "± predicted"]].agg(lambda row: shown(*row, digits=2), axis=1)
    low_rank, both, transport, muon = (ends[name] for name in ("low-rank", *TECHNIQUES, "muon"))
    assert (
        f"at 60 M they are at {low_rank} for low-rank, {both} with both techniques, {transport} "
        f"with transport and {muon[1:]} for Muon"
    ) in PAGE
    assert f"slope per factor of ten in parameters is {trend(table, 'low-rank')} (n 5)" in PAGE
    assert f"gain shrinks with size (slope {trend(table, 'muon')})" in PAGE


def trend(table, label):
    return shown(*table.loc[label, ["slope", "±"]])


def test_gaps_of_Muon_at_S3_by_seed_are_what_it_says():
    wide = paired(final_table(load_runs(SIZES["S3"])), [("muon", "full-rank")]).to_numpy()
    reach = f"{-wide.max():.2f} to {-wide.min():.2f}"
    assert f"end lower, by {reach}, the most" in PAGE
    assert f"where seeds reach from {reach}." in LADDER


def test_the_techniques_table_has_each_size_in_its_column(answers):
    both, transport = TECHNIQUES
    rows = {
        "low-rank with refactorization and reset − low-rank": (both, "low-rank"),
        "low-rank with transport − low-rank": (transport, "low-rank"),
        "low-rank with transport − with refactorization and reset": (transport, both),
    }
    for words, pair in rows.items():
        cells = [answers[size][0][pair] for size in SIZES]
        assert f"| {words} | {' | '.join(cells)} |" in PAGE


def test_rows_at_S1_have_their_gaps_shares_and_differences_at_equal_bytes(answers, at_equal_bytes):
    costs = pd.concat([costs_of([SIZES["S1"]]), costs_of([OTHERS])])
    held = costs.groupby("label")["bytes"].mean()
    interval = r"(\S+ ± \S+|–)"
    row = rf"\| ([\w-]+(?: \+ \w+)?) \| (\d+ %) \| {interval} \| {interval} \| {interval} \|"
    labels = re.findall(row, PAGE)
    assert len(labels) == 17
    for label, share, gap, at_S2, at_its_bytes in labels:
        assert at_its_bytes == shown(*at_equal_bytes.loc[label])
        assert share == f"{held[label] / held['full-rank']:.0%}".replace("%", " %")
        assert gap == answers["S1"][1][label]
        assert at_S2 == answers["S2"][1].get(label, "–")
    mean, half_width = at_equal_bytes["A − dense"], at_equal_bytes["±"]
    below = set(mean.index[mean < -half_width])
    assert below == {"muon", "normuon", "scale", "adamw-8bit", "frugal", "ldadam", "sltrain"}
    above = {"galore", "galore + transport", "golore", "spectron"}
    assert set(mean.index[mean > half_width]) == above
    named = dict(zip(("both techniques", "transport"), TECHNIQUES, strict=True))
    for words, label in {"Muon": "muon", "low-rank": "low-rank", **named}.items():
        assert f"{words} ({shown(*at_equal_bytes.loc[label])})" in PAGE


def test_gaps_in_sentences_belong_to_their_rows_and_sizes(answers):
    for label, words in (
        ("low-rank", "has a gap of {} at S1, {} at S2 and {} at S3"),
        ("muon", "Muon minus AdamW is {} at S1, {} at S2 and {} at S3"),
    ):
        assert words.format(*(answers[size][1][label] for size in SIZES)) in PAGE
    costs = costs_of(SIZES.values())
    by_cost = [at_equal_cost(costs, cost).set_index(["label", "parameters"]) for cost in COSTS]
    of_bytes, of_flops = (
        [shown(*t.loc[("low-rank", n), ["A − dense", "±"]]) for n in (266_816, 663_840)]
        for t in by_cost
    )
    assert "low-rank minus dense is {}) and is not separated at S3 ({}).".format(*of_flops) in PAGE
    assert "it would end higher, {} and {}, but".format(*of_bytes) in PAGE
    held = costs.groupby(["label", "parameters"])["bytes"].mean()
    for label, words in (
        ("low-rank", "It needs {}, {} and {} of"),
        ("muon", "with {}, {} and {} of its"),
    ):
        shares = [f"{held[label, n] / held['full-rank', n]:.0%}".replace("%", " %")
                  for n in (132_432, 266_816, 663_840)]  # fmt: skip
        assert words.format(*shares) in PAGE


def test_what_the_techniques_do_to_factors_and_moments_is_recorded():
    runs = complete_runs(SIZES["S2"])
    ends = structure(runs).set_index("label")
    plain, both = ends.loc["low-rank"], ends.loc["low-rank + refactor + reset"]
    condition = [(row["condition B"] + row["condition A"]) / 2 for row in (plain, both)]
    assert "falls from {:.1f} to {:.1f}".format(*condition) in PAGE
    imbalance = plain["imbalance"], both["imbalance"]
    assert "from {:.2f} to {:.2f}, measured three steps".format(*imbalance) in PAGE
    later = structure(complete_runs(SIZES["S3"])).set_index("label")
    plain, both = later.loc["low-rank"], later.loc["low-rank + refactor + reset"]
    condition = [(row["condition B"] + row["condition A"]) / 2 for row in (plain, both)]
    words = "at S3 from {:.1f} to {:.1f} and from {:.2f} to {:.2f}"
    assert words.format(*condition, plain["imbalance"], both["imbalance"]) in PAGE
    moments = momentum_of(complete_runs(SIZES["S3"])).groupby("label")["momentum_cosine"].mean()
    last = moments["low-rank + transport"]
    finals = finals_of(runs, SIZES["S2"])
    cosines = cosine_table(finals, momentum_of(runs), pairs_of(SIZES["S2"]))
    cosines = cosines.drop_duplicates("A").set_index("A")
    transport = cosines.loc["low-rank + transport", "cosine"]
    words = f"event (cosine {transport:.2f} at S2, {last:.2f} at S3); a reset sets it to zero"
    assert words in PAGE
    assert cosines.loc["low-rank + refactor + reset", "cosine"] == 0


def test_no_pair_is_equal_and_few_are_below_after_correction():
    muon = ["muon", "full-rank"]
    transport = ["low-rank + transport", "low-rank"]
    below = {
        "S1": [muon],
        "S2": [muon, ["muon", "full-rank at beta2 0.95"]],
        "S3": [transport, muon, ["muon", "full-rank at 8.05e-4"]],
    }
    for size, folder in SIZES.items():
        table = verdicts(final_table(load_runs(folder)), pairs_of(folder)).dropna(subset=["±"])
        assert "equal" not in set(table["verdict"])
        remain = [p < 0.05 for p in corrected(table["p (A < B)"].tolist(), "fdr_bh")]
        found = table.loc[remain, ["A", "B"]].to_numpy().tolist()
        assert found == below[size], size


def test_rows_of_the_techniques_have_the_rates_of_second_moments_that_it_says():
    beta2 = {}
    for folder in SIZES.values():
        for run in complete_runs(folder):
            beta2.setdefault(run.label, set()).add(run.config.method_options.get("beta2"))
    labels = ("low-rank", "low-rank + refactor + reset", "low-rank + transport")
    plain, both, transport = (beta2[label] for label in labels)
    assert (plain, both, transport) == ({0.999}, {0.95}, {0.9})
    assert "(0.999 plain, 0.95 with both, 0.9 with transport)" in PAGE


def test_the_peak_of_a_step_is_what_was_measured():
    peaks = {}
    for run in complete_runs(SIZES["S2"]):
        steps = [row.get("peak_memory_bytes") or 0 for row in run.records.metrics]
        peaks[run.label] = max(steps)
    ratio = peaks["low-rank"] / peaks["full-rank"]
    assert f"low-rank is {ratio:.1f} times that of full rank at S2" in PAGE


def test_gigabytes_at_1b_are_those_of_the_formulas():
    rows = re.findall(r"\| ([a-z8, -]+)(?: \(AdamW\))? \| (\d\.\d+) \| (\d+\.\d+) \|", PAGE)
    assert len(rows) == 6  # test_peaks_of_the_table in tests/slow has the other columns
    for methods, held, with_gradients in rows:
        for method in methods.split(", "):
            rank = {"rank": 512} if METHODS[method].uses_rank else {}
            config = RunConfig(model="1b", precision="bf16", method=method, steps=10**6, **rank)
            found = by_formula(resolve(config))
            states = found.weights + found.optimizer_states
            assert held == f"{states / 1e9:.2f}"
            assert with_gradients == f"{(states + found.gradients) / 1e9:.2f}"
    in_gb = {methods: float(held) for methods, held, _ in rows}
    saved = {method: f"{1 - in_gb[method] / in_gb['full-rank']:.0%}".replace("%", " %")
             for method in ("muon", "adamw-8bit")}  # fmt: skip
    assert f"Muon saves {saved['muon']} of them" in PAGE
    assert f"AdamW in 8 bits saves {saved['adamw-8bit']} (" in PAGE


def test_seeds_at_S3_scatter_as_it_says():
    finals = final_table(load_runs(SIZES["S3"]))
    losses = finals[finals["label"] == "low-rank"]["test_loss"]
    assert f"five end between {losses.min():.2f} and {losses.max():.2f}," in PAGE
    dense = finals[finals["label"] == "full-rank"]["test_loss"].sort_values().tolist()
    words = "four of AdamW's between {:.2f} and {:.2f} and one at {:.2f}"
    assert words.format(dense[0], dense[3], dense[4]) in PAGE
    apart = paired(finals, [("muon", "full-rank")]).iloc[0]
    worst = finals[finals["label"] == "full-rank"].set_index("seed")["test_loss"].idxmax()
    assert apart.idxmin() == worst  # the most with the seed whose AdamW run ends highest
    table = claims(finals, [("low-rank + transport", "low-rank")]).iloc[0]
    every = verdicts(finals, pairs_of(SIZES["S3"])).set_index(["A", "B"])
    after = every.loc[("low-rank + transport", "low-rank"), "p (BH)"]
    assert f"(p {table['p (A < B)']:.2g} one-sided, {after:.2g} after Benjamini" in PAGE
    wide = paired(finals, [("low-rank + transport", "low-rank")])
    assert (wide.to_numpy() < 0).all()  # with all five seeds
    falls = {}
    for run in complete_runs(SIZES["S3"]):
        positions = run.by_position
        last = positions[positions["step"] == positions["step"].max()]
        at = last.groupby("position")["loss"].mean()
        falls.setdefault(run.label, []).append(at[16] - at[128])
    ends = {label: f"{min(found):.2f} to {max(found):.2f}" for label, found in falls.items()}
    assert f"falls by {ends['low-rank']} in plain" in PAGE
    assert f"by {ends['low-rank + refactor + reset']} with both" in PAGE
    assert f"With transport it is {ends['low-rank + transport']}" in PAGE
    assert f"at full rank {ends['full-rank']}." in PAGE
    assert f"AdamW's by {ends['full-rank']} and Muon's by {ends['muon']}." in PAGE


def test_the_table_of_moments_has_cosines_and_differences_of_the_records(answers):
    runs = complete_runs(SIZES["S1"])
    table = cosine_table(finals_of(runs, SIZES["S1"]), momentum_of(runs), pairs_of(SIZES["S1"]))
    cosines = table.set_index(["A", "B"])
    rows = {
        "refactorization, moments kept": ("low-rank + refactor", "low-rank"),
        "refactorization and reset": ("low-rank + refactor + reset", "low-rank"),
        "refactorization, moments transported": ("low-rank + transport", "low-rank"),
        "GaLore's refresh, moments transported (kept: −0.04)": ("galore + transport", "galore"),
    }
    for words, pair in rows.items():
        cosine, n = cosines.loc[pair, "cosine"], cosines.loc[pair, "n"]
        assert f"| {words} | {cosine:.2f} | {answers['S1'][0][pair]} | {n} |" in PAGE
    assert f"{cosines.loc[('galore + transport', 'galore'), 'cosine of B']:.2f}" == "-0.04"
    beta2 = max(
        run.config.method_options["beta2"]
        for run in runs
        if run.config.method == "low-rank" and run.config.refactor_every
    )
    assert math.ceil(math.log(0.5) / math.log(beta2)) == 14


def test_the_test_text_has_as_many_documents_as_it_says():
    documents = next(iter(complete_runs(SIZES["S2"]))).documents
    share = documents["tokens"].max() / documents["tokens"].sum()
    assert (
        f"{len(documents)} documents, the largest of which is {share:.0%}".replace("%", " %")
        in PAGE
    )


def test_the_parabola_of_full_rank_at_S3_costs_what_it_says():
    losses = final_table(load_runs(KEPT / "rates_s3")).query(
        "label.str.startswith('full-rank, lr')"
    )
    losses = losses.set_index("lr")["validation_loss"].sort_index()
    chosen = lowest_point(dict(losses))
    between = np.interp(np.log(chosen), np.log(losses.index), losses)
    assert f"would end {between - losses.min():.2f} above the best rate" in PAGE


def test_the_imbalance_of_the_models_is_that_of_teachers_factors_stretched_as_it_says():
    imbalance = {}
    for stretch in (1.5, 10.0):
        B, A = start(teacher(a=1.0, b=1.0, seeds=10), 4, stretch)
        left, right = B.mT @ B, A @ A.mT
        norms = torch.linalg.matrix_norm(left) + torch.linalg.matrix_norm(right)
        imbalance[stretch] = (torch.linalg.matrix_norm(left - right) / norms).mean().item()
    words = "stretched by 1.5 ({:.2f}); stretched by 10 it is {:.2f}"
    assert words.format(*imbalance.values()) in PAGE
    of_sizes = [structure(complete_runs(folder)).set_index("label") for folder in SIZES.values()]
    models = [f"{ends.loc['low-rank', 'imbalance']:.2f}" for ends in of_sizes]
    assert models[0] == models[1]
    assert "{0} at S1 and S2 and {2} at S3".format(*models) in PAGE


def test_tuning_runs_at_S1_are_counted():
    runs = {name: final_table(load_runs(KEPT / name)) for name in ("rates_s1", "betas_s1")}
    muon, dense = (
        sum(int((finals["method"] == method).sum()) for finals in runs.values())
        for method in ("muon", "full-rank")
    )
    assert f"at S1 it had {muon} tuning runs, AdamW {dense}." in PAGE


def test_ranges_of_rates_are_those_of_the_tuning():
    found = robustness(final_table(load_runs(KEPT / "rates_s1")))
    best = found.assign(row=found["label"].str.partition(", ")[0]).drop_duplicates("row")
    width = best.set_index("row")["width"]
    assert (
        f"a factor of {width['cola']:.1f} for CoLA and {width['muon']:.1f} for Muon, "
        f"{width['full-rank']:.1f} for full rank, {width['low-rank']:.1f} for low-rank and "
        f"{width['galore + transport']:.1f} for GaLore with transport"
    ) in PAGE
    edges = best.set_index("row")["diverges at"] / best.set_index("row")["best rate"]
    assert edges["low-rank"] == 4
    assert edges["cola"] == edges["sltrain"] == 2
    assert int(edges.isna().sum()) == 10


def test_another_beta2_of_full_rank_at_S2_ends_no_lower():
    finals = final_table(load_runs(SIZES["S2"]))
    row = claims(finals, [("full-rank at beta2 0.95", "full-rank")]).iloc[0]
    assert f"it ends {row['A − B']:.3f} ± {row['±']:.3f} higher, so that" in PAGE
    assert f"lower ({shown(row['A − B'], row['±'])}), so that" in LADDER
    tuned = final_table(load_runs(KEPT / "beta2_s2")).groupby("label")["validation_loss"].mean()
    first = final_table(load_runs(KEPT / "rates_s2")).query("method == 'full-rank'")
    means = tuned.min(), first.groupby("lr")["validation_loss"].mean().min()
    assert "The lowest, {:.3f} against {:.3f} with 0.99,".format(*means) in LADDER
    assert tuned.idxmin() == "full-rank, beta2 0.95, lr 0.00619"


def test_rates_that_follow_a_law_are_as_far_off_as_it_says():
    """The middle of each grid at S3 is what the law says; the ladder trains what was best."""
    trained = final_table(load_runs(SIZES["S3"])).groupby("label")["lr"].first()
    law = {"low-rank": 1.78e-3, TECHNIQUES[0]: 2.14e-3, TECHNIQUES[1]: 2.12e-3}
    tried = final_table(load_runs(KEPT / "rates_s3"))
    assert all(rate in set(tried["lr"]) for rate in law.values())
    factors = [trained[label] / rate for label, rate in law.items()]
    assert f"by factors of {min(factors):.1f} to {max(factors):.1f}; they" in PAGE


def test_what_the_shared_rate_costs_full_rank_at_S1_is_what_tuning_found():
    one = final_table(load_runs(KEPT / "rest_s1"))["validation_loss"].min()
    shared = final_table(load_runs(KEPT / "rates_s1")).query("method == 'full-rank'")
    assert f"AdamW at S1 {shared['validation_loss'].min() - one:.2f} lower" in PAGE


def test_a_step_of_Muon_takes_as_long_as_it_says():
    taken = extension_module("cost_tables").step_times()
    ratios = [
        taken[f"step at {size}, muon"] / taken[f"step at {size}, full-rank"] for size in SIZES
    ]
    assert f"takes it {min(ratios):.1f} to {max(ratios):.1f} times AdamW's time" in PAGE
