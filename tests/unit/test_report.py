"""Reports: the table, a page that stands alone and escapes its input, records that are kept."""

import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner
from matplotlib import image
from paths import ROOT
from written_runs import write_run

from lowrank_lab import report
from lowrank_lab.analysis import tables
from lowrank_lab.cli import main
from lowrank_lab.commands import interrupts
from lowrank_lab.config import InputError
from lowrank_lab.report import drawings, page
from lowrank_lab.runs.files import append_jsonl, read_jsonl, write_json
from lowrank_lab.runs.run import Run, final_table, find_runs, load_runs


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / "runs" / f"a{seed}", "worse", seed, 3 + seed / 10)
        write_run(tmp_path / "runs" / f"b{seed}", "better", seed, 2 + seed / 10, method="galore")
    return tmp_path / "runs"


@pytest.fixture
def in_this_process(monkeypatch):
    """Reports are written by a thread, which sees what a test replaces."""
    monkeypatch.setattr(interrupts, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))


def test_how_layers_ended_is_the_mean_over_layers_and_seeds_of_the_last_record(tmp_path):
    for seed, condition in ((0, 2.0), (1, 4.0)):
        write_run(tmp_path / str(seed), "factors", seed, method="low-rank")
        rows = [
            {"step": step, "layer": layer, "singular_values": values, "update": [1.0, 1.0, 1.0],
             "condition_B": condition * step, "imbalance": None}
            for step in (1, 2)
            for layer, values in (("a", [3.0, 0.0]), ("b", [1.0 * step, 2.0]))
        ]  # fmt: skip
        (tmp_path / str(seed) / "spectra.jsonl").unlink()
        append_jsonl(tmp_path / str(seed) / "spectra.jsonl", rows)
    (row,) = tables.structure(find_runs(tmp_path)).to_dict("records")
    assert row == {
        "label": "factors",
        "effective rank of W": pytest.approx(1.5),  # 1 and 2
        "effective rank of W − W₀": pytest.approx(3.0),
        "condition B": pytest.approx(6.0),
    }


def test_only_layers_that_all_runs_recorded_count_in_how_they_ended(tmp_path):
    for seed, (label, layers) in enumerate({"few": "b", "all": "abc", "none": ""}.items()):
        write_run(tmp_path / label, label, seed)
        file = tmp_path / label / "spectra.jsonl"
        file.unlink()
        append_jsonl(
            file,
            [{"step": 5, "layer": name, "singular_values": [1.0, float(name == "b")]}
             for name in layers],
        )  # fmt: skip
    table = tables.structure(find_runs(tmp_path)).set_index("label")
    ranks = table["effective rank of W"]
    assert ranks[["few", "all"]].tolist() == pytest.approx([2.0, 2.0])
    assert math.isnan(ranks["none"])


def test_spectra_that_are_not_finite_are_left_out_of_how_layers_ended(tmp_path):
    write_run(tmp_path / "one", "broken", steps=1000)
    layer = {"step": 1000, "layer": "b", "singular_values": [None, 1.0], "update": [None, 1.0]}
    append_jsonl(tmp_path / "one" / "spectra.jsonl", [layer])
    (row,) = tables.structure(find_runs(tmp_path)).to_dict("records")
    rank = math.exp(math.log(3) - 2 * math.log(2) / 3)  # of 2 and 1, the layer that is finite
    assert row == {"label": "broken", "effective rank of W": pytest.approx(rank)}


def test_without_recorded_layers_nothing_is_said_of_their_end(tmp_path):
    write_run(tmp_path / "one", "plain")
    (tmp_path / "one" / "spectra.jsonl").write_text("")
    assert list(tables.structure(find_runs(tmp_path))) == ["label"]
    report.write_report(tmp_path)
    assert "recorded layers" not in (tmp_path / "report.html").read_text()


def test_the_summary_has_a_row_a_label_best_first_with_intervals(folder):
    table = tables.summary(final_table(load_runs(folder)))
    assert table["label"].tolist() == ["better", "worse"]
    assert table["n"].tolist() == [3, 3]
    assert table["test loss"].tolist() == pytest.approx([2.1, 3.1])
    assert table["±"].tolist() == pytest.approx([0.2484] * 2, abs=1e-4)  # t(0.975, 2)·0.1/√3
    assert table["weights + states (MiB)"].tolist() == [3.0, 3.0]

    rest = 3 * 2**20 - 3 * 4 * 2 * 16 * 32  # weights and two moments of embedding and head
    galore, worse = (value * 2**20 for value in table["without embeddings (MiB)"])
    assert (galore, worse) == (rest, rest - 2 * 4)  # torch's AdamW counts its steps in tensors


def test_bytes_that_no_formula_knows_are_a_dash(tmp_path):
    write_run(tmp_path / "one", "alone", optimizer="torch.optim.NAdam")
    table = tables.formatted(tables.summary(final_table(load_runs(tmp_path))))
    assert table["without embeddings (MiB)"].tolist() == ["–"]


def test_differences_are_paired_by_seed(folder):
    (row,) = tables.differences(final_table(load_runs(folder))).itertuples(index=False)
    assert (row.A, row.B, row.n) == ("better", "worse", 3)
    assert row[3] == pytest.approx(-1.0)
    assert row[4] == pytest.approx(0.0, abs=1e-9)  # the seeds move both alike
    assert row.separated


def test_differences_need_two_seeds_in_common(tmp_path):
    write_run(tmp_path / "a", "one", seed=0)
    write_run(tmp_path / "b", "other", seed=1, method="galore")
    assert tables.differences(final_table(load_runs(tmp_path))).empty


def test_what_a_study_asked_has_a_row_a_question_in_its_order(folder):
    for seed, loss in enumerate((3.0, 3.3, 3.1)):
        write_run(folder / f"c{seed}", "third", seed, loss, method="fira")
    asked = [("worse", "better"), ("third", "worse"), ("better", "third")]
    table = tables.claims(final_table(load_runs(folder)), asked)
    assert list(zip(table["A"], table["B"], strict=True)) == asked
    paired = [[1.0] * 3, [0.0, 0.2, -0.1], [-1.0, -1.2, -0.9]]
    assert table["A − B"].tolist() == pytest.approx([sum(d) / 3 for d in paired])
    assert table["separated"].tolist() == [True, False, True]
    # of the third: mean −1.0333, deviation 0.1528, so t = −11.72 with two degrees of freedom
    assert table["p (A < B)"].tolist()[2] == pytest.approx(0.0036, abs=1e-4)
    assert table["p (A < B)"].tolist()[1] == pytest.approx(0.6291, abs=1e-4)  # t = 0.378


def test_verdicts_are_corrected_and_tell_equal_from_open(folder):
    losses = {"third": (3.0, 3.3, 3.1), "same": (3.001, 3.1, 3.202), "far": (9.0, 9.2, 9.1)}
    for label, method in zip(losses, ("fira", "spam", "muon"), strict=True):
        for seed, loss in enumerate(losses[label]):
            write_run(folder / f"{label}{seed}", label, seed, loss, method=method)
    finals = final_table(load_runs(folder))
    asked = [("better", "worse"), ("third", "worse"), ("same", "worse"), ("far", "worse")]
    table = tables.verdicts(finals, asked)
    base = finals.pivot(index="seed", columns="label", values="test_loss")
    assert base["worse"].tolist() == pytest.approx([3.0, 3.1, 3.2])
    assert table["verdict"].tolist() == ["below", "open", "equal", "above"]
    raw = table["p (A < B)"].tolist()
    multiples = [4 / rank * p for rank, p in enumerate(sorted(raw), 1)]
    falling = [min(multiples[rank:]) for rank in range(4)]  # Benjamini and Hochberg's step-up
    assert sorted(table["p (BH)"]) == pytest.approx(falling)


@pytest.mark.parametrize("label", ["not there", "twice", "alone"])
def test_a_question_that_cannot_be_answered_yet_has_dashes(folder, label):
    write_run(folder / "twice-1", "twice", seed=0)
    write_run(folder / "twice-2", "twice", seed=0, lr=0.5)
    write_run(folder / "alone", "alone", seed=0, method="spam")
    table = tables.claims(final_table(load_runs(folder)), [(label, "worse")])
    (row,) = tables.formatted(table).itertuples(index=False)
    assert (row[2], row[4], row[6]) == ("1" if label == "alone" else "0", "–", "–")


@pytest.mark.parametrize("missing", [False, True])
def test_perplexity_against_the_peak_is_drawn_where_every_run_recorded_one(tmp_path, missing):
    for seed, label in enumerate(("a", "b")):
        write_run(tmp_path / label, label, seed, method="galore" if seed else "fira")
        if not (missing and seed):
            metrics = tmp_path / label / "metrics.jsonl"
            held = {"weight_bytes": 2**19, "optimizer_state_bytes": 2**19}
            rows = [row | held for row in read_jsonl(metrics)]
            rows[7]["peak_memory_bytes"], rows[8]["peak_memory_bytes"] = 2**20, (3 + seed) * 2**20
            metrics.unlink()
            append_jsonl(metrics, rows)
    found = {picture.name: picture.table for picture in report.pictures(tmp_path, "tradeoff")}
    assert ("tradeoff_peak" in found) == (not missing)
    if not missing:
        assert sorted(found["tradeoff_peak"]["peak_mib"]) == [3.0, 4.0]


def test_the_report_begins_with_what_was_asked(folder, tmp_path):
    page = report.write_report(folder, out=tmp_path / "out", pairs=[("better", "worse")])
    text = page.read_text()
    assert text.index("Is A below B?") < text.index("Differences, seed by seed")
    (row,) = (tmp_path / "out" / "claims.csv").read_text().splitlines()[1:]
    assert row.startswith("better,worse,3,-1.0")
    first = re.search(r"<img alt=\"([^\"]+)\"", text)[1]
    assert first.startswith("What the study asks")
    assert (tmp_path / "out" / "figures" / "claims.png").exists()


def test_one_seed_has_a_dash_for_its_interval(tmp_path):
    write_run(tmp_path / "one", "alone")
    table = tables.formatted(tables.summary(final_table(load_runs(tmp_path))))
    assert table["±"].tolist() == ["–"]


def test_the_page_stands_alone_and_each_picture_has_words(folder, tmp_path):
    page = report.write_report(folder, "A study", "What is asked.", out=tmp_path / "out")
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<script" not in text
    assert "What is asked." in text
    pictures = re.findall(r"<img alt=\"([^\"]+)\" src=\"data:image/png;base64,", text)
    assert len(pictures) == 8
    assert (tmp_path / "out" / "table.csv").exists()
    assert len(list((tmp_path / "out" / "figures").iterdir())) == 24


def test_a_report_reads_only_what_its_figures_show(tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "MOST_LABELS", 2)
    for i in range(4):
        write_run(tmp_path / f"{i}", f"galore {i}", loss=2 + i / 10)
    for i in (2, 3):
        (tmp_path / f"{i}" / "spectra.jsonl").write_text('[{"not": "a spectrum"}]\n')
    found = list(report.pictures(tmp_path))
    assert [p.name for p in found[4:]] == ["spectra", "spectra_over_training", "spectra_growth"]
    assert found[0].caption.endswith("The 2 best of 4.")
    assert all(set(p.table["label"]) == {"galore 0", "galore 1"} for p in found)


def test_differences_are_taken_from_what_the_study_asks_about_most(tmp_path):
    for seed in (0, 1):
        for i, label in enumerate(("loro", "low-rank", "galore")):
            folder = tmp_path / "runs" / f"{label}-{seed}"
            write_run(folder, label, loss=2 + i / 10 + seed, seed=seed, method=label)
    pairs = [("galore", "low-rank"), ("loro", "low-rank"), ("low-rank", "loro")]
    for asked, reference in ((pairs, "low-rank"), ([], "loro")):
        report.write_report(tmp_path / "runs", out=tmp_path / "out", pairs=asked)
        text = (tmp_path / "out" / "figures" / "differences.csv").read_text()
        assert f"\n{reference},0.0," in text


def test_runs_that_were_evaluated_once_have_no_empty_figure_of_their_course(tmp_path):
    write_run(tmp_path / "runs" / "once", "galore")
    metrics = tmp_path / "runs" / "once" / "metrics.jsonl"
    rows = read_jsonl(metrics)
    for row in rows[:-1]:
        row.pop("validation_loss", None)
    metrics.unlink()
    append_jsonl(metrics, rows)
    names = [picture.name for picture in report.pictures(tmp_path / "runs")]
    assert "tradeoff" in names
    assert not {"loss_by_tokens", "loss_by_time"} & set(names)


def test_what_came_from_outside_is_escaped(tmp_path):
    hostile = "<script>alert(1)</script>"
    write_run(tmp_path / "runs" / "x", hostile, spectra_layers=hostile)
    write_run(tmp_path / "runs" / "<script>", 'two\nlines "quoted"', seed=1)
    text = report.write_report(tmp_path / "runs", "<b>t</b>", "<i>d</i>").read_text()
    assert "<script" not in text
    assert "<b>t" not in text
    assert "<i>d" not in text
    assert "&lt;script&gt;" in text


def test_a_report_on_unfinished_runs_is_refused_and_writes_nothing(folder, tmp_path):
    (folder / "a1" / "result.json").unlink()
    with pytest.raises(InputError, match="a1"):
        report.write_report(folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kept_records_are_thin_and_give_the_same_report(folder, tmp_path):
    assert len(report.keep(folder, tmp_path / "kept")) == 6
    names = {"runs.parquet", "steps.parquet"}
    assert {path.name for path in (tmp_path / "kept").iterdir()} == names
    rows = Run(tmp_path / "kept" / "a0").records.metrics
    assert len(rows) == 201
    assert rows[66]["events"] == [{"event": "reset"}]
    first = report.write_report(folder, "t", out=tmp_path / "first")
    second = report.write_report(tmp_path / "kept", "t", out=tmp_path / "second")
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize(("study", "names"), [("rank_and_reset", ["map"]), ("quick", [])])
def test_a_grid_of_one_method_gets_heat_maps(study, names):
    folder = ROOT / "data" / "study" / study
    assert [picture.name for picture in report.pictures(folder, "map")] == names


def test_spectra_are_drawn_of_a_few_variants_that_differ(tmp_path):
    methods = ["galore", "galore", "fira", "low-rank", "low-rank", "muon", "full-rank", "lora"]
    for i, method in enumerate(methods):
        write_run(tmp_path / str(i), f"{method} {i}", 1, 2 + i / 10, method=method)
    drawn = {picture.name: picture for picture in report.pictures(tmp_path, "spectra")}
    assert set(drawn) == {"spectra", "spectra_over_training", "spectra_growth"}
    few = ["galore 0", "fira 2", "low-rank 3", "muon 5", "full-rank 6", "lora 7"]
    assert list(dict.fromkeys(drawn["spectra"].table["label"])) == few
    assert list(dict.fromkeys(drawn["spectra_over_training"].table["label"])) == few
    assert "6 of 8 variants" in drawn["spectra_growth"].caption
    growth = drawn["spectra_growth"].table
    assert set(growth["largest"]) == {2.0}
    assert growth["stable_rank"].tolist() == pytest.approx([5 / 4] * len(growth))


def test_spectra_of_factors_alone_are_not_drawn_as_those_of_weights(tmp_path):
    for label in ("weights", "factors"):
        write_run(tmp_path / label, label)
    file = tmp_path / "factors" / "spectra.jsonl"
    rows = [row | {"layer": row["layer"] + "[B]"} for row in read_jsonl(file)]
    file.unlink()
    append_jsonl(file, rows)
    names = [picture.name for picture in report.pictures(tmp_path, "spectra")]
    assert names == ["spectra_over_training", "spectra_growth"]


def test_records_can_be_kept_without_training_steps(folder, tmp_path):
    report.keep(folder, tmp_path / "kept", rows=0)
    rows = Run(tmp_path / "kept" / "a0").records.metrics
    assert rows
    assert all("validation_loss" in row or row["events"] for row in rows)


@pytest.mark.usefixtures("in_this_process")
def test_all_kept_studies_are_reported_on_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("lowrank_lab.paths.shipped_folder", lambda: tmp_path / "shipped")
    refused = CliRunner().invoke(main, ["report"])
    assert refused.exit_code == 2
    assert "it holds no kept studies" in refused.output
    shipped = tmp_path / "shipped" / "data" / "study" / "shipped"
    report.keep(folder, shipped)
    for name in ("one", "two"):
        report.keep(folder, tmp_path / "data" / "study" / name)
    done = CliRunner().invoke(main, ["report", "--figures", str(tmp_path / "pictures")])
    assert done.exit_code == 0, done.output
    for name in ("one", "two"):
        assert (tmp_path / "data" / "runs" / "kept" / name / "report.html").exists()
        assert (tmp_path / "pictures" / name / "loss_by_tokens.png").exists()
    assert "shipped" not in done.output
    shutil.rmtree(tmp_path / "data")
    alone = CliRunner().invoke(main, ["report", "--figures", str(tmp_path / "pictures")])
    assert alone.exit_code == 0, alone.output
    assert (tmp_path / "data" / "runs" / "kept" / "shipped" / "report.html").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_kept_ladder_is_drawn_with_the_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("lowrank_lab.paths.shipped_folder", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    for size in (1, 2):
        for label, loss in (("full-rank", 2.0), ("muon", 1.8)):
            place = tmp_path / "runs" / str(size) / label
            write_run(place, label, 1, loss)
            result = json.loads((place / "result.json").read_text())
            write_json(place / "result.json", result | {"parameters": size * 10**5})
        report.keep(tmp_path / "runs" / str(size), tmp_path / "data" / "study" / f"ladder_s{size}")
    shown = tmp_path / "figures" / "ladder" / "loss_over_costs.png"
    shown.parent.mkdir(parents=True)
    shown.write_bytes(b"old")
    done = CliRunner().invoke(main, ["report"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "data" / "runs" / "kept" / "ladder" / "gap_over_size.png").exists()
    assert shown.read_bytes() != b"old"
    assert [path.name for path in shown.parent.iterdir()] == [shown.name]


@pytest.mark.usefixtures("in_this_process")
def test_pictures_that_are_shown_are_renewed_and_no_others_are_put_beside_them(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    report.keep(folder, tmp_path / "data" / "study" / "one")
    shown = tmp_path / "figures" / "one"
    shown.mkdir(parents=True)
    for name in ("tradeoff", "of_old"):
        (shown / f"{name}.png").write_bytes(b"old")
    drawn = page.drawn
    monkeypatch.setattr(
        page, "drawn", lambda *a: (p for p in drawn(*a) if p.name in ("tradeoff", "memory"))
    )
    assert CliRunner().invoke(main, ["report"]).exit_code == 0
    made = tmp_path / "data" / "runs" / "kept" / "one" / "figures"
    assert {path.name for path in shown.iterdir()} == {"tradeoff.png", "of_old.png"}
    assert (made / "memory.png").exists()
    assert (shown / "of_old.png").read_bytes() == b"old"
    pictures = [image.imread(place / "tradeoff.png")[..., :3] for place in (shown, made)]
    assert abs(pictures[0] - pictures[1]).mean() < 0.005
    assert (shown / "tradeoff.png").stat().st_size < (made / "tradeoff.png").stat().st_size / 2
