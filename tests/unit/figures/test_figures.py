"""Figures show what is in the table: the right numbers, colours and names, and no missing seed."""

import itertools
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from lowrank_lab import figures, train
from lowrank_lab.analysis.spectra import middle_layers
from lowrank_lab.analysis.stats import mean_interval
from lowrank_lab.config import InputError
from lowrank_lab.methods.registry import METHODS

LABELS = ("full-rank", "low-rank", "low-rank + both", "mine")


def runs_table(labels=LABELS, seeds=(0, 1, 2), steps=(10, 20, 30)):
    rows = [
        {
            "run": f"{label}-{seed}", "label": label, "step": step, "tokens_seen": 100 * step,
            "seconds": step / 7, "loss": 5 - step / 10 + seed / 50, "lr_now": 0.01,
            "validation_loss": 4 - step / 20 + i / 10 + seed / 100,
        }
        for i, label in enumerate(labels)
        for seed in seeds
        for step in steps
    ]  # fmt: skip
    return pd.DataFrame(rows)


def finals_table(labels=LABELS, seeds=(0, 1, 2)):
    return pd.DataFrame(
        [
            {
                "label": label, "weight_bytes": (i + 1) * 2**20, "optimizer_state_bytes": 2**21,
                "test_perplexity": 20 - i + seed / 10,
            }
            for i, label in enumerate(labels)
            for seed in seeds
        ]
    )  # fmt: skip


def texts(figure):
    return [t.get_text().strip() for ax in figure.axes for t in ax.texts]


def spectra_table(layers=("model.layers.0.q_proj", "model.layers.1.q_proj"), steps=(0, 5)):
    rows = [
        (step, layer, i, 2.0 ** -(i + step)) for step in steps for layer in layers for i in range(4)
    ]
    return pd.DataFrame(rows, columns=["step", "layer", "index", "singular_value"])


def test_curves_are_means_over_seeds_with_student_intervals():
    table = figures.curve_table(runs_table())
    row = table[(table["label"] == "low-rank") & (table["step"] == 20)].iloc[0]
    expected = mean_interval([3.1, 3.11, 3.12])
    assert (row["mean"], row["half_width"], row["n"]) == pytest.approx(expected)


def test_a_seed_that_is_missing_at_a_step_is_refused():
    runs = runs_table()
    with pytest.raises(InputError, match="2 of 3 seeds"):
        figures.loss_curves(runs.drop(runs.index[-1]))


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="wall_time"):
        figures.curve_table(runs_table(), x="wall_time")


@pytest.mark.parametrize("x", ["tokens_seen", "seconds"])
def test_loss_curves_name_each_label_with_its_last_value(x):
    figure = figures.loss_curves(runs_table(), x)
    assert sorted(texts(figure)) == [
        "full-rank  2.510", "low-rank  2.610", "low-rank + both  2.710", "mine  2.810",
    ]  # fmt: skip


def test_lines_of_one_colour_show_their_style_beside_their_names():
    ax = figures.loss_curves(runs_table()).axes[0]  # two of the four labels are low-rank's
    assert sorted(line.get_linestyle() for line in ax.lines) == sorted(["-", "-", "-", "--"] * 2)
    ax = figures.loss_curves(runs_table(["galore", "fira"])).axes[0]
    assert len(ax.lines) == 2


def test_the_number_of_seeds_is_said():
    title = figures.loss_curves(runs_table()).axes[0].get_title("right")
    assert title == "mean of 3 seeds, 95 % interval"
    assert figures.loss_curves(runs_table(seeds=(0,))).axes[0].get_title("right") == "one seed each"


def test_the_tradeoff_puts_each_label_at_its_bytes_and_mean_perplexity():
    table = figures.tradeoff_table(finals_table())
    assert table["weights_and_states_mib"].tolist() == [3, 4, 5, 6]
    assert table["mean"].tolist() == pytest.approx([20.1, 19.1, 18.1, 17.1])
    figure = figures.tradeoff(finals_table())
    assert sorted(texts(figure))[0] == "full-rank  20.10"


def test_the_tradeoff_can_be_against_the_peak_of_a_step():
    finals = finals_table().assign(peak_bytes=2**25)
    table = figures.tradeoff_table(finals, peak=True)
    assert table["peak_mib"].tolist() == [32.0] * 4
    (ax,) = figures.tradeoff(finals, peak=True).axes
    assert ax.get_xlabel() == "peak memory of a step (MiB)"
    assert "weights + optimizer states" in figures.tradeoff(finals).axes[0].get_xlabel()


def test_the_tradeoff_parts_markers_of_the_same_bytes_only_where_their_intervals_meet():
    finals = finals_table(seeds=[0]).assign(weight_bytes=2**22, optimizer_state_bytes=0)
    finals["test_perplexity"] = [10.0, 10.1, 10.2, 20.0]
    (ax,) = figures.tradeoff(finals).axes
    at = [line.get_transform().transform(line.get_xydata())[0, 0] for line in ax.lines]
    assert len({round(x) for x in at[:3]}) == 3
    assert at[3] == at[0] == pytest.approx(ax.transData.transform((4, 10))[0])


def test_one_label_alone_can_be_drawn():
    assert texts(figures.tradeoff(finals_table(["galore"], [0]))) == ["galore  20.00"]
    assert texts(figures.loss_curves(runs_table(["galore"], [0], [10]))) == ["3.500"]
    ax = figures.loss_curves(runs_table(["galore"], [0])).axes[0]
    assert ax.get_title(loc="left") == "galore"
    assert ax.get_ylim()[1] >= ax.get_lines()[0].get_ydata().max()  # nothing is cut off


def test_a_method_keeps_its_colour_and_its_variants_differ_by_line():
    labels = ["low-rank + both", *LABELS]
    colour, line, marker = figures.style_of("low-rank", labels)
    assert (colour, line, marker) == (figures.colour_of("low-rank"), "-", "o")
    assert figures.style_of("low-rank + both", labels) == (colour, "--", "s")
    assert figures.style_of("low-rank", ["galore", "low-rank"])[0] == colour
    assert figures.style_of("low-rank, wider start", ["low-rank, wider start"])[0] == colour
    assert figures.style_of("mine", LABELS)[0] not in [method.colour for method in METHODS.values()]


def test_memory_bars_count_projections_once():
    memory = pd.DataFrame(
        [{"label": "galore", "weights": 4, "gradients": 4, "optimizer_states": 5, "projections": 2,
          "activations": 100}]
    )  # fmt: skip
    memory.iloc[:, 1:] *= 2**20
    table = figures.memory_table(memory).set_index("category")["mib"]
    assert table["optimizer_states"] == 3
    assert texts(figures.memory_bars(memory)) == ["13.00"]
    assert texts(figures.memory_bars(memory, activations=True)) == ["113.00"]


def test_spectra_draw_a_line_for_each_step_and_leave_out_zeros():
    spectra = spectra_table()
    spectra.loc[spectra["index"] == 3, "singular_value"] = 0.0
    figure = figures.spectrum_curves(spectra, ["model.layers.0.q_proj"])
    lines = figure.axes[0].get_lines()
    assert len(lines) == 2
    np.testing.assert_allclose(lines[1].get_ydata(), [2**-5, 2**-6, 2**-7])
    np.testing.assert_allclose(lines[1].get_xdata(), [1, 2, 3])


def test_compared_spectra_draw_the_end_of_training_of_each_label():
    table = pd.concat([spectra_table().assign(label=label) for label in ("galore", "low-rank")])
    last = figures.last_spectra(table)
    assert set(last["step"]) == {5}
    assert set(last["layer"]) == set(middle_layers(table["layer"]))
    figure = figures.compared_spectra(last)
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["galore", "low-rank"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["galore", "low-rank"]


def test_spectra_of_layers_that_were_not_recorded_are_refused():
    with pytest.raises(InputError, match="nope"):
        figures.spectrum_curves(spectra_table(), ["nope"])


def test_effective_rank_is_a_line_a_kind():
    table = figures.effective_rank_table(spectra_table())
    p = np.array([8, 4, 2, 1]) / 15
    assert table["effective_rank"].tolist() == pytest.approx([np.exp(-(p * np.log(p)).sum())] * 4)
    assert len(figures.effective_rank_curves(spectra_table()).axes[0].get_lines()) == 1


def test_training_curves_show_loss_and_learning_rate():
    loss, rate = figures.training_curves(runs_table(seeds=(0,))).axes
    assert len(loss.get_lines()) == len(rate.get_lines()) == len(LABELS)
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), [4, 3, 2])


def test_saved_figures_are_png_svg_and_csv_and_the_same_each_time(tmp_path):
    table = figures.tradeoff_table(finals_table())
    first, second = (
        figures.save(figures.tradeoff(finals_table()), table, tmp_path / name / "tradeoff")
        for name in ("a", "b")
    )
    assert [p.suffix for p in first] == [".png", ".svg", ".csv"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    pd.testing.assert_frame_equal(pd.read_csv(first[2]), table)


def test_saving_leaves_a_figure_as_it_was_and_cuts_nothing_off(tmp_path):
    table = spectra_table()
    figure = figures.spectrum_curves(table)
    engine, dpi = figure.get_layout_engine(), figure.dpi
    png, svg, _ = figures.save(figure, table, tmp_path / "once")
    assert (figure.get_layout_engine(), figure.dpi) == (engine, dpi)
    drawn = figures.spectrum_curves(table)
    with mpl.rc_context(figures.STYLE):  # the layout and the box that matplotlib itself finds
        drawn.savefig(tmp_path / "plain.png", bbox_inches="tight", metadata={"Software": None})
    assert png.read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert "<svg" in svg.read_text()


def test_names_beside_curves_stay_within_the_height_of_the_axis():
    figure, ax = figures.drawing.canvas(4, 3)
    ends = [(15 + 0.1 * i, f"row {i}", "black") for i in range(17)]
    ax.set_ylim(10, 50)
    figures.drawing.label_ends(ax, [*ends, (42.0, "far", "black")])
    heights = sorted(text.xy[1] for text in ax.texts)
    assert heights[0] >= 0.03
    assert heights[-1] <= 0.98
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.05
    assert figure.get_axes() == [ax]


def test_labels_that_would_overlap_are_pushed_apart():
    positions = figures.spread([1.0, 1.0, 1.01, 5.0], 0.5)
    assert all(b - a >= 0.49 for a, b in pairwise(positions))
    assert positions == sorted(positions)


def test_the_timeline_of_a_step_marks_its_phases_and_its_peak():
    from lowrank_lab.config import RunConfig
    from lowrank_lab.planning.simulate import simulate

    trace = simulate(RunConfig(model="tiny", method="galore", rank=4, batch=2)).steps["next"]
    figure = figures.memory_timeline(trace.table(), "a step")
    said = {text.get_text() for text in figure.axes[0].texts}
    assert {"forward", "backward", "optimizer"} <= said
    assert any(f"{trace.peak.total / 1e6:.2f} MB" in text for text in said)


def test_the_course_of_memory_draws_peaks_above_what_is_held():
    runs = pd.DataFrame(
        {
            "run": ["a", "a", "b"], "label": ["galore", "galore", "fira"], "step": [1, 2, 1],
            "peak_memory_bytes": [5e6, 7e6, None], "weight_bytes": 1e6,
            "optimizer_state_bytes": 2e6,
        }
    )  # fmt: skip
    table = figures.memory_course_table(runs)
    assert table["persistent"].tolist() == [3e6] * 3
    peak, persistent = figures.memory_course(runs).axes[0].get_lines()
    assert list(peak.get_ydata()) == [5, 7]
    assert list(persistent.get_ydata()) == [3, 3]


def test_compared_memory_counts_projections_once():
    names = list(figures.STEP_CATEGORIES)
    accounts = pd.DataFrame([{"label": "galore", **dict.fromkeys(names, 1e9)}])
    accounts["optimizer_states"] = 3e9  # of them 1 GB of projections
    assert texts(figures.compared_memory(accounts)) == ["9.00"]


def test_facts_of_layers_are_those_of_the_recorded_spectra(tmp_path):
    from lowrank_lab import RunConfig

    config = RunConfig(
        model="tiny", method="sltrain", rank=4, corpus="markov", vocab_size=64, steps=8, batch=2,
        sequence_length=32, spectra_every=4, eval_tokens=64, test_tokens=64, refactor_every=3,
    )  # fmt: skip
    run = train(config, tmp_path / "run", label="mine")
    facts = figures.layer_facts([run])
    name = "model.layers.1.mlp.up_proj"
    row = facts[(facts["step"] == 8) & (facts["layer"] == name)].iloc[0]
    spectra = run.spectra
    values = spectra[(spectra["step"] == 8) & (spectra["layer"] == name)]["singular_value"]
    shares = (values / values.sum()).to_numpy()
    assert row["effective_rank"] == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), rel=1e-5
    )
    assert row["stable_rank"] == pytest.approx((values**2).sum() / values.max() ** 2, rel=1e-5)
    assert row["imbalance"] < 0.5
    figure = figures.fact_curves(facts, ["effective_rank", "imbalance"])
    assert [ax.get_title() for ax in figure.axes if ax.get_visible()] == [
        "effective rank", "imbalance of the factors",
    ]  # fmt: skip
    assert len(figures.share_curves(run.spectra_of("low_rank_share")).axes) >= 7
    bars = figures.momentum_bars(run.momentum.assign(label="mine"))
    assert [t.get_text() for t in bars.axes[0].get_yticklabels()] == ["mine: refactor"]
    with pytest.raises(InputError, match="recorded"):
        figures.fact_curves(facts, ["overlap"])
