"""Figures that compare final losses: paired by seed, and over learning rates."""

import pandas as pd
import pytest
from scipy.stats import ttest_rel

from lowrank_lab import figures
from lowrank_lab.config import InputError


def finals(losses, lr=0.01):
    """label → losses by seed."""
    rows = [
        {"label": label, "seed": seed, "lr": lr, "test_loss": loss, "validation_loss": loss}
        for label, of in losses.items()
        for seed, loss in enumerate(of)
        if loss is not None
    ]
    return pd.DataFrame(rows)


LOSSES = {"full-rank": [3.0, 3.5, 2.8], "galore": [3.2, 3.6, 3.1], "mine": [2.9, 3.3, 2.9]}


def test_differences_are_paired_by_seed_with_student_s_interval():
    table = figures.difference_table(finals(LOSSES), "full-rank").set_index("label")
    for label in ("galore", "mine"):
        test = ttest_rel(LOSSES[label], LOSSES["full-rank"]).confidence_interval(0.95)
        row = table.loc[label]
        low, high = row["difference"] - row["half_width"], row["difference"] + row["half_width"]
        assert (low, high) == pytest.approx((test.low, test.high))
    assert table.loc["full-rank", "difference"] == 0
    assert table.index.tolist() == ["mine", "full-rank", "galore"]


def test_only_seeds_that_both_have_are_compared():
    table = figures.difference_table(
        finals({"a": [1.0, 2.0, 3.0], "b": [1.5, None, 4.0], "c": [None, None, 3.5]}), "a"
    ).set_index("label")
    assert table["n"].to_dict() == {"a": 3, "b": 2, "c": 1}
    assert table.loc["b", "difference"] == pytest.approx(0.75)
    assert pd.isna(table.loc["c", "half_width"])
    assert pd.isna(table.loc["b", "seed 1"])


def test_the_figure_of_differences_shows_every_seed_mean_and_interval():
    (ax,) = figures.differences(finals(LOSSES), "full-rank").axes
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["mine", "full-rank", "galore"]
    dots = [line for line in ax.lines if line.get_markersize() == 3]
    assert sorted(dots[2].get_xdata()) == pytest.approx([0.1, 0.2, 0.3])
    assert "full-rank, same seed" in ax.get_xlabel()
    assert "3 seeds" in ax.get_title(loc="right")


def test_each_claim_has_a_row_in_the_order_of_the_questions_if_a_seed_can_answer_it():
    losses = LOSSES | {"late": [None, 3.0, None], "other": [3.0, None, 3.0]}
    asked = [("mine", "full-rank"), ("galore", "unknown"), ("late", "other"), ("late", "galore")]
    table = figures.claim_table(finals(losses), asked)
    assert list(zip(table["A"], table["B"], strict=True)) == [asked[0], asked[3]]
    assert table["n"].tolist() == [3, 1]
    assert table.loc[0, ["seed 0", "seed 1", "seed 2"]].tolist() == pytest.approx([-0.1, -0.2, 0.1])
    assert table.loc[1, "difference"] == pytest.approx(-0.6)


def test_the_figure_of_claims_says_which_are_separated_and_on_which_side():
    losses = {"low": [1.0, 1.1, 1.2], "high": [2.0, 2.2, 2.1], "near": [1.1, 1.0, 1.25]}
    asked = [("low", "high"), ("high", "low"), ("low", "near")]
    (ax,) = figures.claims(finals(losses), asked).axes
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["low − high", "high − low", "low − near"]
    below, above, undecided = (text.get_color() for text in ax.texts)
    assert len({below, above, undecided}) == 3
    assert ax.texts[0].get_text() == "−1.000 ± 0.248  n 3"  # deviation 0.1, t 4.303


def test_intervals_of_two_seeds_do_not_stretch_the_axis_of_claims():
    losses = {"a": [1.0, 1.1, 1.2], "b": [1.2, 1.3, 1.5], "two": [1.0, 1.5]}
    (ax,) = figures.claims(finals(losses), [("a", "b"), ("two", "b")]).axes
    low, high = ax.get_xlim()
    assert low < -0.4
    assert high < 1  # the interval of the second reaches to 2.5 on either side
    assert ax.texts[1].get_text().startswith("+0.000 ± 2.541")


def test_a_reference_that_is_not_there_is_named():
    with pytest.raises(InputError, match="reference: 'best' is not allowed; one of full-rank"):
        figures.difference_table(finals(LOSSES), "best")


def tuned():
    parts = [
        finals({f"galore, scale {scale}, lr {lr}": [loss, loss + 0.2]}, lr=lr)
        for scale in (0.25, 1.0)
        for lr, loss in ((0.01, 3.0 + scale), (0.02, 2.8), (0.04, 3.1))
    ]
    return pd.concat([*parts, finals({"muon, lr 0.02": [2.5]}, lr=0.02)], ignore_index=True)


def test_rates_are_grouped_by_variant_and_setting_with_the_mean_over_seeds():
    table = figures.rate_table(tuned())
    assert table["variant"].unique().tolist() == ["galore", "muon"]
    assert set(table["label"]) == {"galore, scale 0.25", "galore, scale 1.0", "muon"}
    row = table[(table["label"] == "galore, scale 1.0") & (table["lr"] == 0.01)].iloc[0]
    assert (row["mean"], row["n"]) == (pytest.approx(4.1), 2)


def test_the_best_rate_of_each_variant_is_marked():
    axes = figures.rates(tuned()).axes
    assert [ax.get_title(loc="left") for ax in axes[:2]] == ["galore", "muon"]
    rings = [line for line in axes[0].lines if line.get_markersize() == 9]
    assert [(r.get_xdata()[0], r.get_ydata()[0]) for r in rings] == [(0.02, pytest.approx(2.9))]
    legend = axes[0].get_legend()
    assert legend.get_title().get_text() == "scale"
    assert [t.get_text() for t in legend.get_texts()] == ["0.25", "1"]


def test_settings_stand_in_the_order_of_their_value_and_rates_of_decades_have_their_numbers():
    parts = [
        finals({f"muon, momentum {momentum}, lr {lr:g}": [3.0 + momentum]}, lr=lr)
        for momentum in (0.8, 0.975, 0.6)
        for lr in (0.004, 0.01, 0.02, 0.04, 0.08, 0.2)
    ]
    figure = figures.rates(pd.concat(parts, ignore_index=True))
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0.6", "0.8", "0.975"]
    figure.draw_without_rendering()
    shown = [t.get_text() for t in ax.get_xticklabels()]
    assert {"0.01", "0.1"} <= {*shown} <= {"0.001", "0.01", "0.1", "1"}
    assert len(ax.get_xticks(minor=True)) == 5


def test_a_diverged_line_ends_below_the_names_of_settings():
    table = tuned()
    table.loc[(table["lr"] == 0.04), "validation_loss"] = 9.0
    ax = figures.rates(table).axes[0]
    line = next(line for line in ax.lines if len(line.get_xdata()) == 3)
    _, top = ax.transData.inverted().transform(line.get_clip_box().max)
    assert 2.9 < top < ax.get_ylim()[1]


def test_settings_of_several_names_are_written_in_full():
    parts = [finals({f"galore, scale 1, rank {r}, lr {lr}": [3.0]}, lr=lr)
             for r in (4, 8) for lr in (0.01, 0.02)]  # fmt: skip
    parts.append(finals({f"galore, alpha 4, lr {lr}": [3.0]}, lr=lr) for lr in (0.01, 0.02))
    ax = figures.rates(pd.concat([*parts[:-1], *parts[-1]], ignore_index=True)).axes[0]
    shown = [t.get_text() for t in ax.get_legend().get_texts()]
    assert shown == ["scale 1, rank 4", "scale 1, rank 8", "alpha 4"]


RANKS = {"low-rank, rank 4": [3.4, 3.6], "low-rank": [3.1, 3.2], "full-rank": [3.0]}


def with_ranks(**columns):
    table = finals(RANKS)
    table["rank"] = table["label"].map({"low-rank, rank 4": 4, "low-rank": 16, "full-rank": None})
    table["rank"] = table["rank"].astype(object).where(table["rank"].notna(), None)
    return table.assign(weight_bytes=2**20, optimizer_state_bytes=2**21, **columns)


def test_ranks_of_one_variant_are_one_line_and_a_method_without_rank_a_point():
    table = figures.rank_table(with_ranks()).set_index(["variant", "rank"])
    assert table["mean"].tolist() == pytest.approx([3.5, 3.15, 3.0])
    assert table["n"].tolist() == [2, 2, 1]
    assert set(table["weights_and_states_mib"]) == {3.0}
    (ax,) = figures.over_ranks(with_ranks()).axes
    lines = {c.get_label(): c.lines[0].get_ydata().tolist() for c in ax.containers}
    assert lines == {"low-rank": pytest.approx([3.5, 3.15]), "full-rank": [3.0]}
    assert {text.get_text() for text in ax.texts} == {"4", "16"}


def test_dense_models_of_several_widths_are_one_line_beside_the_ranks():
    losses = {"low-rank, rank 4": [3.5], "low-rank, rank 16": [3.1],
              "full-rank, width 24": [3.4], "full-rank, width 32": [3.2]}  # fmt: skip
    table = finals(losses)
    ranks = {"low-rank, rank 4": 4, "low-rank, rank 16": 16}
    table["rank"] = table["label"].map(ranks).astype(object)
    table["rank"] = table["rank"].where(table["rank"].notna(), None)
    (ax,) = figures.over_ranks(table.assign(weight_bytes=2**20, optimizer_state_bytes=2**21)).axes
    lines = {c.get_label(): c.lines[0].get_ydata().tolist() for c in ax.containers}
    assert lines == {"low-rank": [3.5, 3.1], "full-rank": [3.4, 3.2]}
    assert {text.get_text() for text in ax.texts} == {"4", "16", "24", "32"}
    assert "widths" in ax.get_title(loc="left")


def test_variants_of_equal_rank_and_memory_share_a_number():
    losses = {"a, rank 4": [3.5], "a, rank 16": [3.1], "b, rank 4": [3.6], "b, rank 16": [3.0]}
    table = finals(losses)
    table["rank"] = table["label"].str.extract(r"rank (\d+)")[0].astype(int)
    (ax,) = figures.over_ranks(table.assign(weight_bytes=2**20, optimizer_state_bytes=2**21)).axes
    assert sorted(text.get_text() for text in ax.texts) == ["16", "4"]


def test_sizes_whose_memory_falls_are_points_without_a_line():
    losses = {"low-rank, rank 4": [3.5], "low-rank, rank 16": [3.1]}
    table = finals(losses).assign(rank=[4, 16], optimizer_state_bytes=2**21)
    lines = {}
    for name, sizes in {"growing": [2**20, 2**22], "falling": [2**22, 2**20]}.items():
        (ax,) = figures.over_ranks(table.assign(weight_bytes=sizes)).axes
        lines[name] = ax.containers[0].lines[0].get_linestyle()
    assert (lines["growing"] != "None", lines["falling"]) == (True, "None")


def test_a_peak_gets_a_panel_of_its_own():
    states, peak = figures.over_ranks(with_ranks(peak_bytes=2**24)).axes
    assert "states" in states.get_xlabel()
    assert peak.containers[0].lines[0].get_xdata().tolist() == [16.0, 16.0]
