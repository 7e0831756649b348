"""Typed numbers of the book's tables of the ladder (docs/results/ladder.md) and of the controls."""

import re

import numpy as np
import pytest
from paths import NOTEBOOKS, ROOT

from lowrank_lab.analysis.ladder import gap_table, gaps_of
from lowrank_lab.analysis.rates import robustness
from lowrank_lab.analysis.tables import claims, verdicts
from lowrank_lab.figures import cosine_table, layer_facts
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.report import asked_in
from lowrank_lab.runs.run import (
    complete_runs,
    final_table,
    finals_of,
    first_runs,
    load_runs,
    momentum_of,
    positions_of,
)

KEPT = ROOT / "data" / "study"
SIZES = ("ladder_s1", "ladder_s2", "ladder_s3")


def page(name):
    return " ".join((ROOT / "docs" / "results" / f"{name}.md").read_text().split())


LADDER = page("ladder")


def finals(name):
    return final_table(load_runs(KEPT / name))


def shown(mean, half_width):
    return f"{mean:+.3f} ± {half_width:.3f}".replace("-", "−")


def test_every_interval_is_a_gap_or_an_answer():
    known = set()
    for name in (*SIZES, "length"):
        _, pairs = asked_in(NOTEBOOKS / "studies" / f"{name}.yaml")
        asked = claims(finals(name), pairs).dropna(subset=["±"])
        known |= {shown(*row) for row in asked[["A − B", "±"]].to_numpy()}
    beside = claims(finals("ladder_s2"), [("ldadam", "full-rank at beta2 0.95")])
    known |= {shown(*row) for row in beside[["A − B", "±"]].to_numpy()}
    gaps = gap_table(gaps_of([KEPT / name for name in SIZES]))
    known |= {shown(*row) for row in gaps[["gap", "±"]].to_numpy()}
    unsigned = {interval.lstrip("+−") for interval in known}
    stated = re.findall(r"([+−]?)(\d\.\d+ ± \d\.\d+)", LADDER)
    assert len(stated) >= 4
    for sign, interval in stated:
        assert (sign + interval in known) if sign else (interval in unsigned), interval


def test_cosines_are_those_of_the_records():
    cosines = {}
    for name in ("ladder_s1", "ladder_s2"):
        runs = complete_runs(KEPT / name)
        _, pairs = asked_in(NOTEBOOKS / "studies" / f"{name}.yaml")
        table = cosine_table(finals_of(runs, KEPT / name), momentum_of(runs), pairs)
        cosines[name] = table.drop_duplicates("A").set_index("A")["cosine"]
        if name == "ladder_s1":
            galore = table.set_index("A").loc["galore + transport"]
    small, larger = cosines["ladder_s1"], cosines["ladder_s2"]
    transport = (larger["low-rank + transport"], small["low-rank + transport"])
    assert "direction (cosine {:.2f} at S2, {:.2f} at S1)".format(*transport) in LADDER
    assert f"kept moments {small['low-rank + refactor']:.2f} of it (S1)" in LADDER
    rises = f"rises from {galore['cosine of B']:.2f} to {galore['cosine']:.2f}"
    assert rises.replace("-", "−") in LADDER


def test_widths_of_rates_are_those_of_the_tuning():
    found = robustness(finals("rates_s1"))
    best = found.assign(variant=found["label"].str.partition(", ")[0]).drop_duplicates("variant")
    best = best.set_index("variant")
    widths = best["width"].sort_values()
    assert widths.index[:2].tolist() == ["cola", "muon"]
    assert widths.index[-1] == "galore + transport"
    three = widths.iloc[[0, 1, -1]]
    assert "of {:.1f} (CoLA) or {:.1f} (Muon) to {:.1f} (GaLore".format(*three) in LADDER
    low, full = widths["low-rank"], widths["full-rank"]
    assert f"low-rank ({low:.1f}) is not narrower than full rank ({full:.1f})" in LADDER
    words = ["Nine", "Ten", "Eleven"]
    assert f"{words[best['diverges at'].isna().sum() - 9]} rows did not diverge" in LADDER


def test_stable_ranks_are_those_of_one_seed():
    facts = layer_facts(first_runs(complete_runs(KEPT / "ladder_s1")))
    last = facts[facts["step"] == facts["step"].max()].groupby("label")["stable_rank"].mean()
    dense = sorted(last[["muon", "normuon"]])
    assert "highest stable rank ({:.0f} to {:.0f} of 48)".format(*dense) in LADDER
    assert last.idxmax() in ("muon", "normuon")
    low = last[["low-rank", "sltrain"]]
    assert set(last.sort_values().index[:5]) >= {"low-rank"}
    assert f"({low['low-rank']:.0f} and {low['sltrain']:.0f})" in LADDER


def test_rates_at_S2_are_the_shares_of_those_at_S1_that_it_states():
    rates = {label: lr[64] / lr[48] for label, lr in rates_of_methods()}
    flat = [rates.pop(name) for name in ("scale", "galore", "muon", "spectron")]
    best, frugal = rates.pop("frugal"), finals("ladder_s2").query("label == 'frugal'")["lr"]
    taken = frugal.iloc[0] / METHODS["frugal"].lr[48]
    text = f"and FRUGAL's {taken:.2f} times (its best that was tried: {best:.2f})"
    tuned = {name: finals(f"ladder_{name}").groupby("label")["lr"].first() for name in ("s1", "s2")}
    shares = tuned["s2"] / tuned["s1"]
    rates["low-rank + refactor"] = shares["low-rank + refactor"]
    flat.append(shares["galore + transport"])
    low, *_, high = sorted(rates, key=rates.__getitem__)
    assert (low, high) == ("cola", "low-rank + refactor")
    assert f"{rates['cola']:.2f}" == f"{rates['ldadam']:.2f}"
    spread = f"are {rates[low]:.2f} (CoLA, LDAdam) to {rates[high]:.2f} ({high}) times those"
    assert spread in LADDER
    assert text in LADDER
    assert f"are {min(flat):.2f} to {max(flat):.2f} times, around 1/width" in LADDER


def rates_of_methods():
    """Default rates over the width, of methods that are tuned at S2; low-rank's from an SVD."""
    for name in finals("rates_s2")["method"].unique():
        yield name, METHODS[name].spectral_lr if name == "low-rank" else METHODS[name].lr


def test_what_the_page_says_of_single_rows_is_recorded():
    text, found = page("others"), finals("others_s1").set_index(["label", "seed"])
    held = found.xs(11, level="seed")[["weight_bytes", "optimizer_state_bytes"]]
    small, low_rank, full = (held.loc[name] for name in ("adamw-8bit", "low-rank", "full-rank"))
    both = [row.sum() + row["weight_bytes"] for row in (small, low_rank)]  # gradients, in float32
    assert f"({both[0] / both[1] - 1:.0%} more with".replace("%", " %") in text
    states = small["optimizer_state_bytes"] / full["optimizer_state_bytes"]
    assert f"its states are {states:.0%} of AdamW's".replace("%", " %") in text
    norms = load_runs(KEPT / "others_s1").groupby("label")["grad_norm"]
    assert max(norms.max()[["full-rank", "spam", "stable-spam"]]) < 3
    clipped = norms.agg(lambda values: (values.dropna() > 1).mean())
    assert f"{clipped['lora']:.1f} {clipped['low-rank']:.2f}" == "0.2 0.01"
    rate = found["lr"].xs(11, level="seed")
    assert f"at {rate['relora'] / rate['lora']:.1f} times LoRA's rate" in text
    tried = finals("others_rates_s1")["label"].str.startswith("low-rank (Kaiming) + refactor")
    assert f"to {tried.sum()} rates and scales" in text


def test_seeds_of_full_rank_on_a_quarter_of_the_tokens_end_where_it_says():
    found = finals("length")
    losses = found[found["label"] == "full-rank, 5"]["test_loss"]
    assert f"AdamW's seeds end between {losses.min():.2f} and {losses.max():.2f}" in LADDER
    _, pairs = asked_in(NOTEBOOKS / "studies" / "length.yaml")
    verdict = verdicts(found, pairs).set_index(["A", "B"])["verdict"]
    assert verdict["low-rank + transport, 5", "low-rank, 5"] == "above"


def test_on_four_times_the_tokens_muon_ends_below_and_low_rank_above_also_after_correction():
    _, pairs = asked_in(NOTEBOOKS / "studies" / "length.yaml")
    verdict = verdicts(finals("length"), pairs).set_index(["A", "B"])["verdict"]
    assert verdict["muon, 80", "full-rank, 80"] == "below"
    assert verdict["low-rank, 80", "full-rank, 80"] == "above"
    falls = _falls_after_32("length").filter(like=", 80")
    muon = falls.pop("muon, 80")
    stated = f"by {muon:.2f} after the 32nd token, that of the others by at most {falls.max():.2f}"
    assert stated in LADDER


def _falls_after_32(name):
    """How much lower each row's last loss is at positions from 128 on than from 32 to 63."""
    positions = positions_of(complete_runs(KEPT / name))
    step = positions.groupby("label")["step"].transform("max")
    last = positions[positions["step"] == step]
    losses = last.groupby(["label", "position"])["loss"].mean().unstack()
    return losses[32] - losses[128]


def test_of_small_gaps_at_S2_none_is_separated_from_full_rank_at_its_other_beta2():
    other = "full-rank at beta2 0.95"
    rows = ["fira", "frugal", "scale", "apollo", "ldadam"]
    found = claims(finals("ladder_s2"), [(row, other) for row in rows])
    assert not found["separated"].any()
    small = found["A − B"].iloc[:-1]
    assert (round(small.min(), 2), round(small.max(), 2)) == (0, 0.03)
    assert "Fira, FRUGAL, SCALE and APOLLO are at 0.00 to +0.03 and not separated" in LADDER
    separated = claims(finals("ladder_s2"), [("muon", other), ("normuon", other)])["separated"]
    assert separated.all()


def test_FRUGALs_parabola_alone_costs_more_than_a_fiftieth_on_the_seeds_of_tuning():
    tuning = finals("rates_s2").assign(row=lambda f: f["label"].str.partition(", ")[0])
    losses = tuning.groupby(["row", "lr"])["validation_loss"].mean()
    taken = finals("ladder_s2").groupby("label")["lr"].first()
    costs = {}
    for row in losses.index.unique("row"):
        tried = losses[row]
        found = np.interp(np.log(taken[row]), np.log(tried.index), tried)
        costs[row] = found - tried.min()
    assert f"{costs.pop('frugal'):.3f}" == "0.028"
    highest = sorted(costs, key=costs.__getitem__)[-2:]
    assert highest == ["scale", "normuon"]
    assert [f"{costs[row]:.3f}" for row in highest] == ["0.017", "0.018"]


def test_of_the_rows_at_S2_three_use_late_context():
    falls = _falls_after_32("ladder_s2")
    three = [falls.pop(name) for name in ("muon", "normuon", "ldadam")]
    words = "by {:.2f} to the window's end, NorMuon's by {:.2f} and LDAdam's by {:.2f}, and AdamW's"
    assert words.format(*three) in LADDER
    assert f"hardly, as in all other rows of S2 (by at most {falls.max():.3f})" in LADDER


def test_losses_in_sentences_are_those_of_the_runs():
    spectron = finals("rates_s1").query("method == 'spectron'")["validation_loss"]
    momenta = finals("rates_s1").query("method == 'spectron'")
    best = momenta.groupby(momenta["label"].str.extract(r"momentum ([\d.]+)")[0])[
        "validation_loss"
    ].min()
    assert f"ends at {spectron.min():.2f} with four of five momenta" in LADDER
    assert int(np.isclose(best, spectron.min(), atol=0.05).sum()) >= 4
    alone = finals("spectron_rest_s1")["validation_loss"]
    assert f"the best of twelve runs ends at {alone.min():.2f}" in LADDER
    assert len(alone) == 12


def test_the_controls_of_the_start_are_those_of_the_runs():
    table = finals("controls").set_index("label")["validation_loss"]
    kaiming = table[table.index.str.startswith("low-rank (Kaiming)")].min()
    spectral = table[table.index.str.match(r"low-rank, lr [\d.e-]+$")].min()
    assert f"({kaiming:.3f} and {spectral:.3f}, one seed)" in page("controls")


@pytest.mark.parametrize("size", ["rates_s2", "rates_s3"])
def test_no_best_rate_is_the_first_or_last_that_was_tried(size):
    table = finals(size)
    names = table["label"].str.partition(", lr")[0]
    for _, part in table.groupby(names):
        losses = part.groupby("lr")["validation_loss"].mean()
        assert losses.index.min() < losses.idxmin() < losses.index.max()


def test_no_way_to_apply_the_techniques_differs_after_correction():
    _, pairs = asked_in(NOTEBOOKS / "studies" / "techniques_s1.yaml")
    table = verdicts(finals("techniques_s1"), pairs)
    assert set(table["verdict"]) == {"open"}
    assert table.index[table["separated"]].tolist() == [0, 2]  # the page names the first and last
    assert "The first and the last interval do not contain 0; after correction" in page(
        "techniques"
    )


def test_of_the_other_rows_one_verdict_is_left_and_one_seed_of_ReLoRA_ends_high():
    found, text = finals("others_s1"), page("others")
    _, pairs = asked_in(NOTEBOOKS / "studies" / "others_s1.yaml")
    left = verdicts(found, pairs).set_index(["A", "B"])["verdict"].drop_duplicates(keep=False)
    assert dict(left) == {("adamw-8bit", "low-rank"): "below"}
    losses = found.pivot(index="seed", columns="label", values="test_loss")
    assert f"one of its seeds ended at {losses['relora'].max():.2f}" in text
    apart = sorted(losses["relora"] - losses["lora"])
    assert f"the others are {apart[0]:.2f} and {apart[1]:.2f} above LoRA" in text
    held = found.groupby("label")[["weight_bytes", "optimizer_state_bytes"]].mean().sum(axis=1)
    assert 1.3 < held["lora"] / held["low-rank"] < 1.36
    assert "with a third more bytes" in text
    rates = robustness(finals("others_rates_s1")).drop_duplicates("label")
    relora = rates[rates["label"] == "relora, alpha 48"].iloc[0]
    assert relora["diverges at"] == 2 * relora["best rate"]


@pytest.mark.parametrize(
    ("name", "studies"),
    [
        ("techniques", ["techniques_s1"]),
        ("ranks", ["ranks_s1", "ladder_s1"]),
        ("others", ["others_s1"]),
    ],
)
def test_intervals_of_an_exploratory_page_are_answers_of_its_studies(name, studies):
    known = set()
    for study in studies:
        _, pairs = asked_in(NOTEBOOKS / "studies" / f"{study}.yaml")
        answers = claims(finals(study), pairs)
        known |= {shown(*row) for row in answers[["A − B", "±"]].to_numpy()}
    stated = re.findall(r"[+−]\d\.\d+ ± \d\.\d+", page(name))
    assert len(stated) >= 3
    assert set(stated) <= known
