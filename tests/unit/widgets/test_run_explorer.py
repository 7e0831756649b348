"""The explorer over a folder of runs, driven as a reader drives it, without a browser."""

import gc
import json
import re
import shutil
import threading
import time

import pandas as pd
import pytest

from benchmarks.many_runs import LAYERS, VARIANTS, grow, write_many
from lowrank_lab.config import InputError
from lowrank_lab.figures.page import image_tag
from lowrank_lab.runs import series
from lowrank_lab.runs.catalogue import read_catalogue
from lowrank_lab.runs.run import Run
from lowrank_lab.widgets import run_explorer
from lowrank_lab.widgets.background import read_ahead
from lowrank_lab.widgets.run_explorer import Dashboard
from lowrank_lab.widgets.run_plots import PLOTS, Choice
from lowrank_lab.widgets.run_view import MAX_ROWS, file_of, load_view

SEEDS = 9  # of each configuration


def data_of(figure, dark):
    """In place of a picture, which takes longer: bytes that differ as the pictures would."""
    drawn = [artist for ax in figure.axes for artist in (*ax.lines, *ax.collections, *ax.patches)]
    values = [getattr(artist, "get_array", lambda: None)() for artist in drawn]
    places = [str(artist.get_path().vertices) for artist in drawn if hasattr(artist, "get_path")]
    words = [ax.get_xlabel() + ax.get_title(loc="left") for ax in figure.axes]
    content = repr((values, places, words, figure.get_size_inches())).encode()
    return image_tag(f"{'dark' if dark else 'light'} picture", content)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(run_explorer, "live_image", data_of)
    monkeypatch.setattr(run_explorer, "read_ahead", lambda entries: threading.Event())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """All seven labels at one rank and rate; the last is in training, stopped, failed, broken."""
    folder = tmp_path_factory.mktemp("many")
    return folder, write_many(folder, SEEDS * len(VARIANTS), steps=80)


@pytest.fixture
def board(many):
    found = Dashboard(Choice(str(many[0])))
    yield found
    found.follow.value = False


@pytest.fixture
def few(tmp_path):
    """A folder that a test may change: the seeds of one label, four of them not finished."""
    return tmp_path / "few", write_many(tmp_path / "few", 6, steps=80)


def labels(board):
    return [row["cells"][0] for row in board.table.rows]


def choose(board, *wanted):
    board.table.selected = [r["id"] for r in board.table.rows if r["cells"][0] in wanted]


def test_the_table_has_a_row_for_each_configuration(board):
    names = [column["name"] for column in board.table.columns]
    assert names == ["label", "rank", "rate", "seed", "loss", "±", "MiB", "state"]
    assert set(VARIANTS) < set(labels(board))
    assert board.table.rows[2]["cells"][:4] == ["fira", "4", "0.001", "9 seeds"]
    assert board.count.value == "8 of 8 rows, 0 chosen"


def test_at_first_it_shows_a_row_of_each_label(board):
    assert board.text.value == "6 configurations (50 runs), validation_loss against training tokens"
    assert re.fullmatch(r'<img alt="[^"]+" src="data:image/png;base64,[^>]+>', board.picture.value)


def test_rows_that_are_chosen_are_drawn_as_means_over_their_seeds(board):
    before = board.picture.value
    choose(board, "fira", "galore")
    assert board.text.value.startswith("2 configurations (18 runs), validation_loss")
    assert board.picture.value != before
    assert board.count.value.endswith("2 chosen")
    assert set(board._view.table["n"]) == {SEEDS}


def test_single_runs_keep_the_choice(board):
    choose(board, "fira")
    board.rows.value = False
    assert len(board.table.selected) == SEEDS
    assert board.text.value.startswith("9 runs, ")
    board.rows.value = True
    assert board.text.value.startswith("1 configuration (9 runs), ")


def test_a_search_and_fields_filter_the_rows_and_keep_the_choice(board):
    choose(board, "fira", "galore")
    board.search.value = "lora"
    assert labels(board) == ["lora"]
    assert board.count.value == "1 of 8 rows, 2 chosen"
    board.search.value = ""
    board.fields["label"].value = "galore"
    assert labels(board) == ["galore"]
    board.all.click()
    assert board.text.value.startswith("1 configuration (9 runs), ")
    board.none.click()
    assert board.count.value == "1 of 8 rows, 0 chosen"


def test_a_search_that_means_nothing_is_a_line(board):
    board.search.value = "nothing=2"
    assert "a column is one of label, model, rank" in board.count.value
    assert len(board.table.rows) == 8


def test_a_heading_sorts_the_rows(board):
    board.table.sort = ["loss", False]
    assert labels(board)[0] == "full-rank"
    board.table.sort = ["loss", True]
    assert labels(board)[-2:] == ["full-rank", "apollo-r4-lr0.001-s8"]  # a broken run has no loss


@pytest.mark.parametrize("plot", PLOTS)
def test_each_plot_has_a_picture_its_numbers_and_a_line(board, plot):
    choose(board, "fira", "galore", "full-rank")
    board.plot.value = plot
    assert board.text.value.startswith("3 configurations (27 runs), ")
    assert "<img" in board.picture.value
    for kind, start in {"png": b"\x89PNG", "svg": b"<?xml", "csv": b""}.items():
        name, content = file_of(board._view, kind)
        assert name.startswith(f"many0-{plot}")
        assert name.endswith(f".{kind}")
        assert content.startswith(start)
    assert content.count(b"\n") == len(board._view.table) + 1


def test_controls_are_those_of_the_plot(board):
    shown = {}
    for plot in PLOTS:
        board.plot.value = plot
        knobs = {"metric": board.metric, "x": board.x, "layer": board.layer, "step": board.step}
        shown[plot] = [name for name, knob in knobs.items() if knob.layout.display != "none"]
    assert shown == {"curves": ["metric", "x"], "tradeoff": [], "spectra": ["layer", "step"],
                     "heat": ["layer"], "memory": []}  # fmt: skip


def test_metric_and_axis_change_the_curves(board):
    pictures = {board.picture.value}
    board.metric.value = "loss"
    assert board.text.value.endswith("loss against training tokens")
    pictures.add(board.picture.value)
    board.x.value = "seconds"
    pictures.add(board.picture.value)
    assert len(pictures) == 3


def test_layer_and_step_change_the_spectrum(board):
    board.plot.value = "spectra"
    assert list(board.layer.options) == LAYERS
    assert board.step.options == (0, 40, 80)
    assert board.text.value.endswith(f"layer {LAYERS[3]}, step = 80")
    pictures = {board.picture.value}
    board.step.value = 40
    pictures.add(board.picture.value)
    board.layer.value = LAYERS[0]
    pictures.add(board.picture.value)
    assert board.text.value.endswith(f"layer {LAYERS[0]}, step = 40")
    assert len(pictures) == 3


def test_a_narrow_page_gets_a_narrow_picture(board):
    board.table.width = 370
    assert board._view.figure.get_figwidth() == pytest.approx(3.7)


def test_a_picture_is_drawn_once_for_each_change(board, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_explorer, "load_view",
                        lambda *args: drawn.append(args) or load_view(*args))  # fmt: skip
    choose(board, "fira")
    board.plot.value = "heat"
    board.search.value = "galore"
    board.rows.value = False
    assert len(drawn) == 3


def test_a_dark_page_gets_a_dark_picture_of_the_same_figure(board):
    figure = board._view.figure
    board.theme.dark = True
    assert "dark picture" in board.picture.value
    choose(board, "fira")
    assert "dark picture" in board.picture.value
    board.theme.dark = False
    assert "light picture" in board.picture.value
    assert figure is not board._view.figure


def test_a_run_is_read_once_and_drawn_without_collecting_garbage(many, monkeypatch):
    read, enabled = [], []
    monkeypatch.setattr(series, "_quickly", lambda path: read.append(path))
    monkeypatch.setattr(run_explorer, "live_image", lambda *_: enabled.append(gc.isenabled()))
    monkeypatch.setattr(Dashboard, "_show", lambda self: enabled.append(gc.isenabled()))
    series._metrics.cache_clear()
    board = Dashboard(Choice(str(many[0])))
    enabled.clear()
    for _ in range(2):
        board.all.click()
        board.none.click()
    board.follow.value = False
    assert len(read) == len(set(read)) <= len(many[1])
    assert set(enabled) == {False}
    assert gc.isenabled()


def test_what_a_choice_may_need_is_read_ahead_and_a_run_that_cannot_be_read_is_passed_over(few):
    folder, paths = few
    (paths[0] / "metrics.jsonl").write_bytes(b"\xff\xfe")
    series._metrics.cache_clear()
    entries = read_catalogue(str(folder))
    read_ahead(entries)
    wait_for(lambda: series._metrics.cache_info().currsize >= len(entries) - 2)
    before = series._metrics.cache_info().misses
    series.metrics_of(next(e for e in entries if e.state == "finished" and e.folder != paths[0]))
    assert series._metrics.cache_info().misses == before
    read_ahead(entries).set()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "read ahead"])


def test_following_survives_whatever_a_read_raises(monkeypatch, few):
    monkeypatch.setattr(run_explorer, "PERIOD", 0.05)
    folder, paths = few
    board = Dashboard(Choice(str(folder), (paths[-4].name,), over_seeds=False))
    with monkeypatch.context() as patch:
        patch.setattr(run_explorer, "read_catalogue", lambda folder: 1 / 0)
        wait_for(lambda: "division by zero" in board.text.value)
    grow(paths[-4], 60)
    wait_for(lambda: board.text.value.endswith("at step 60"))
    board.follow.value = False


def test_a_file_that_is_read_quickly_has_the_same_numbers(few):
    folder = few[1][0]
    found = series._quickly(folder / "metrics.jsonl")
    pd.testing.assert_frame_equal(found, Run(folder).metrics.select_dtypes("number"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8')
    assert series._quickly(folder / "metrics.jsonl") is None


def test_a_broken_and_a_failed_run_are_a_line_and_the_others_are_shown(board):
    assert board.trouble.value.startswith("1 of 63 broken: apollo-r4-lr0.001-s8 (config.json is ")
    failed = "1 of 63 failed: apollo-r4-lr0.001-s7 (loss is not finite)"
    assert board.trouble.value.endswith(failed)
    assert "\n" not in board.trouble.value
    marked = [row["cells"][0] for row in board.table.rows if row["trouble"]]
    assert marked == ["apollo", "apollo-r4-lr0.001-s8"]


@pytest.mark.parametrize("file", ["metrics.jsonl", "spectra.jsonl", "memory.json", "result.json"])
def test_any_damaged_file_is_told_and_the_others_are_shown(few, file):
    folder, paths = few
    (paths[0] / file).write_bytes(b'\xff\xfe{"step')
    views = [load_view(Choice(str(folder), plot=plot)) for plot in PLOTS]
    assert any(paths[0].name in f"{view.line} {view.trouble}" for view in views)
    assert sum(view.figure is not None for view in views) == len(PLOTS)


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_a_folder_without_runs_is_one_line(board, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = board.text.value, board.folder.value
    board.path.value = str(tmp_path / name)
    expected = "it holds no runs" if name == "empty" else "there is no such folder"
    assert expected in board.text.value
    assert "\n" not in board.text.value
    assert board.picture.value == ""
    assert board.table.rows == []
    board.folder.value = before[1]
    assert board.text.value == before[0]


def test_folders_are_chosen_from_those_that_hold_runs(board, many):
    assert {"study/quick", "study/ladder_s1", str(many[0])} <= set(board.folder.options)
    board.folder.value = "study/quick"
    assert "low-rank" in labels(board)
    assert "configurations" in board.text.value


def test_a_folder_may_be_a_run_itself(many):
    _, paths = many
    assert load_view(Choice(str(paths[0]))).known == [paths[0].name]


def test_runs_without_spectra_or_memory_say_so(few):
    folder, paths = few
    for path in paths:
        for name in ("spectra.jsonl", "memory.json"):
            (path / name).unlink()
    lines = {plot: load_view(Choice(str(folder), plot=plot)).line for plot in PLOTS}
    assert lines["spectra"] == lines["heat"] == "1 configuration (2 runs), no spectra yet"
    assert lines["memory"].endswith("no memory measured yet")


def test_a_run_before_its_first_step_is_one_line(few):
    folder, paths = few
    for path in paths[1:]:
        shutil.rmtree(path)
    (paths[0] / "result.json").unlink()
    (paths[0] / "metrics.jsonl").write_text("")
    line = load_view(Choice(str(folder))).line
    assert (
        line == f"1 configuration (1 run), no step trained yet, {paths[0].name} stopped at step 0"
    )


def test_before_the_first_evaluation_the_training_loss_is_shown(few):
    folder, paths = few
    training = paths[-4]
    rows = (training / "metrics.jsonl").read_text().splitlines()[:3]
    (training / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    line = load_view(Choice(str(folder), (training.name,), over_seeds=False)).line
    assert line == (
        "1 run, loss against training tokens, no validation_loss yet, "
        f"{training.name} training at step 3"
    )


def test_more_rows_than_a_figure_can_name_are_cut_and_it_is_said(many):
    names = tuple(path.name for path in many[1])
    line = load_view(Choice(str(many[0]), names, over_seeds=False)).line
    assert line.startswith(f"{MAX_ROWS} of 62 chosen runs, ")


def test_reading_again_follows_a_run_in_training(few):
    folder, paths = few
    training = paths[-4]
    board = Dashboard(Choice(str(folder), (training.name,), over_seeds=False))
    assert board.follow.value
    board.follow.value = False
    assert board.text.value.endswith(f"{training.name} training at step 40")
    before, rows = board.picture.value, board.table.rows
    grow(training, 80)
    board.refresh()
    assert board.text.value.endswith(f"{training.name} training at step 80")
    assert board.picture.value != before
    assert board.table.rows != rows
    assert board.table.selected == [training.name]


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def followers():
    return [t for t in threading.enumerate() if t.name == "follow" and t.is_alive()]


def test_a_row_that_is_chosen_while_the_folder_is_read_again_stays_chosen(few):
    """The browser's choice waits for the thread that reads, and which draws the table anew."""
    folder, paths = few
    board = Dashboard(Choice(str(folder)))
    row = board.table.rows[0]["id"]
    with board._lock:
        other = threading.Thread(target=setattr, args=(board.table, "selected", [row]))
        other.start()
        while board.table.selected != [row]:
            time.sleep(0.01)
        grow(paths[-4], 60)
        board.refresh()
    other.join()
    assert board.table.selected == [row]
    assert "1 chosen" in board.count.value
    board.follow.value = False


def test_follow_reads_again_until_it_is_switched_off(monkeypatch, few):
    monkeypatch.setattr(run_explorer, "PERIOD", 0.05)
    folder, paths = few
    board = Dashboard(Choice(str(folder), (paths[-4].name,), over_seeds=False))
    assert all(thread.daemon for thread in followers())  # it ends with the kernel
    grow(paths[-4], 60)
    wait_for(lambda: board.text.value.endswith("at step 60"))
    shutil.rmtree(folder)  # it outlives what it follows
    wait_for(lambda: "there is no such folder" in board.text.value)
    board.follow.value = False
    wait_for(lambda: not followers())


def test_a_pattern_chooses_runs_and_a_wrong_one_is_refused(many):
    folder = str(many[0])
    assert len(run_explorer.select(folder, "^fira")) == SEEDS
    assert run_explorer.select(folder, "") == ()
    with pytest.raises(InputError, match="not a regular expression"):
        run_explorer.select(folder, "(")


def test_every_widget_has_a_label(board):
    knobs = [board.folder, board.path, board.search, board.rows, *board.fields.values(),
             board.metric, board.x, board.layer, board.step, board.follow, board.all,
             *board.files.values()]  # fmt: skip
    assert all(knob.description for knob in knobs)
    assert board.table.name == "runs"


def test_headless_shows_lines_and_what_was_drawn_beforehand(many, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
    run_explorer.dashboard(Choice(str(many[0])))
    names = [type(thing).__name__ for thing in shown]
    assert names == ["Markdown", "Drawing", "Drawing", "Slider", "Drawing", "Drawing"]
    assert "1 of 63 broken" in shown[0].data
    steps = shown[3].texts
    assert (steps[0], steps[-1], steps[shown[3].start]) == ("step = 0", "step = 80", "step = 80")
    assert len(set(shown[3].images)) == len(steps)


def test_a_download_carries_the_file(board, monkeypatch):
    sent = []
    monkeypatch.setattr(board.table, "send", lambda *message: sent.append(message))
    board.files["csv"].click()
    [(content, [body])] = sent
    assert content == {"name": "many0-curves-validation_loss.csv", "type": "text/csv"}
    assert body.startswith(b"title,step,tokens_seen,mean,half_width,n\n")
    assert json.dumps(content)
