"""The dashboard over a folder of runs, driven as a reader drives it."""

import json
import re
import shutil
import threading
import time

import pytest

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.widgets import run_explorer
from lowrank_lab.widgets.run_explorer import Choice, Dashboard, load_view

LAYERS = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
MEMORY = {"weights": 2**20, "gradients": 2**20, "optimizer_states": 2**21, "projections": 0,
          "activations": 2**22}  # fmt: skip


def write(folder, name, seed=0, steps=40, finished=True, spectra=True, memory=True, **fields):
    """A run folder as training leaves it after some steps."""
    run = folder / name
    run.mkdir(parents=True)
    config = resolve(RunConfig(**{"model": "tiny", "seed": seed} | fields))
    (run / "config.json").write_text(json.dumps({"config": config.model_dump(), "label": None}))
    grow(run, 1, steps)
    if spectra:
        rows = [
            {"step": step, "layer": layer, "singular_values": [3.0 + step + seed, 1.0]}
            for step in (0, 20, 40) for layer in LAYERS if step <= steps
        ]  # fmt: skip
        (run / "spectra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if memory:
        (run / "memory.json").write_text(json.dumps(MEMORY))
    if finished:
        (run / "result.json").write_text(json.dumps({"test_loss": 3.0}))
    return run


def grow(run, first, last):
    """Append rows of training, as a run in progress does."""
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            row = {"step": step, "tokens_seen": 100 * step, "seconds": 0.1 * step, "lr": 0.01,
                   "loss": 6.0 - 0.05 * step, "peak_memory_bytes": 2**20 + step}  # fmt: skip
            row |= {"validation_loss": 6.1 - 0.05 * step} if step % 10 == 0 else {}
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1):
        write(tmp_path, f"full-{seed}", seed)
    write(tmp_path, "low", method="low-rank")
    return tmp_path


@pytest.fixture
def board(folder):
    found = Dashboard(Choice(str(folder)))
    yield found
    found.follow.value = False


def pictures(board):
    return {name: picture.value for name, picture in board.pictures.items()}


def test_at_first_it_shows_a_run_of_each_label(board):
    assert board.runs.options == ("full-0", "full-1", "low")
    assert board.runs.value == ("full-0", "low")
    assert board.text.value == f"2 runs, validation_loss, layer {LAYERS[1]}, step = 40"
    for picture in pictures(board).values():
        assert re.fullmatch(r'<img alt="[^"]+" src="data:image/png;base64,[^>]+>', picture)


def test_every_widget_has_a_label(board):
    assert all(knob.description for knob in [*board._knobs, board.follow])


def test_the_metric_changes_the_curves_and_nothing_else(board):
    before = pictures(board)
    board.metric.value = "loss"
    after = pictures(board)
    assert board.text.value == f"2 runs, loss, layer {LAYERS[1]}, step = 40"
    assert [name for name in before if before[name] != after[name]] == ["curves"]


def test_the_x_axis_changes_the_curves(board):
    before = pictures(board)
    board.x.value = "seconds"
    assert pictures(board)["curves"] != before["curves"]


def test_the_step_slider_has_the_recorded_steps_and_moves_the_spectra(board):
    before = pictures(board)
    assert board.step.options == (0, 20, 40)
    board.step.value = 20
    assert board.text.value.endswith("step = 20")
    assert pictures(board)["spectra"] != before["spectra"]
    assert pictures(board)["curves"] == before["curves"]


def test_the_layer_is_named_in_text_and_picture(board):
    before = pictures(board)
    board.layer.value = LAYERS[0]
    assert f"layer {LAYERS[0]}" in board.text.value
    assert pictures(board)["spectra"] != before["spectra"]


def test_runs_are_chosen_one_by_one(board):
    before = pictures(board)
    board.runs.value = ("full-1",)
    assert board.text.value.startswith("1 run, ")
    after = pictures(board)
    assert all(before[name] != after[name] for name in before)


def test_another_folder_has_other_runs(board, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(other, "alone")
    board.folder.value = str(other)
    assert board.runs.options == board.runs.value == ("alone",)
    assert board.text.value.startswith("1 run, ")


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_a_folder_without_runs_is_one_line(board, tmp_path_factory, name):
    place = tmp_path_factory.mktemp("place")
    (place / "empty").mkdir()
    (place / "file").write_text("")
    board.folder.value = str(place / name)
    expected = "it holds no runs" if name == "empty" else "there is no such folder"
    assert expected in board.text.value
    assert "\n" not in board.text.value
    assert set(pictures(board).values()) == {""}
    assert board.runs.options == ()


def test_it_recovers_from_a_folder_that_is_not_there(board, folder):
    board.metric.value = "loss"
    before = board.text.value
    board.folder.value = str(folder / "nowhere")
    board.folder.value = str(folder)
    assert board.text.value == before


def test_runs_without_spectra_or_memory_say_so(tmp_path):
    write(tmp_path, "bare", spectra=False, memory=False)
    view = load_view(Choice(str(tmp_path)))
    assert view.line == "1 run, validation_loss, no spectra yet, no memory measured yet"
    assert list(view.figures) == ["curves"]


def test_a_run_before_its_first_evaluation_shows_the_training_loss(tmp_path):
    write(tmp_path, "young", steps=3, finished=False, spectra=False)
    line = load_view(Choice(str(tmp_path))).line
    assert line == (
        "1 run, loss, no spectra yet, no validation_loss yet, young in progress at step 3"
    )


def test_a_run_before_its_first_step_is_one_line(tmp_path):
    write(tmp_path, "born", steps=0, finished=False)
    assert "no run in it has trained a step yet" in load_view(Choice(str(tmp_path))).line


@pytest.mark.parametrize(
    ("name", "words"),
    [("config.json", "config.json is damaged"), ("memory.json", "cannot be read: JSONDecodeError")],
)
def test_a_damaged_record_is_one_line(tmp_path, name, words):
    run = write(tmp_path, "hurt")
    (run / name).write_text('{"config"')
    view = load_view(Choice(str(tmp_path)))
    assert words in view.line
    assert view.figures == {}


def test_a_folder_may_be_a_run_itself(folder):
    assert load_view(Choice(str(folder / "low"))).known == ["low"]


def test_more_runs_than_a_figure_can_name_are_cut_and_it_is_said(tmp_path):
    for seed in range(14):
        write(tmp_path, f"r{seed:02d}", seed, spectra=False)
    names = tuple(f"r{seed:02d}" for seed in range(14))
    assert load_view(Choice(str(tmp_path), names)).line.startswith("12 runs of 14 chosen, ")


def test_spectra_are_the_last_ones_up_to_the_step(folder):
    view = load_view(Choice(str(folder), ("full-0", "full-1"), step=30))
    lines = view.figures["spectra"].axes[0].get_lines()
    assert [line.get_ydata()[0] for line in lines] == [23.0, 24.0]


def test_reading_again_follows_a_run_in_progress(tmp_path):
    run = write(tmp_path, "busy", steps=20, finished=False)
    board = Dashboard(Choice(str(tmp_path)))
    assert board.text.value.endswith("step = 20, busy in progress at step 20")
    before = pictures(board)
    grow(run, 21, 40)
    with (run / "spectra.jsonl").open("a") as file:
        for layer in LAYERS:
            row = {"step": 40, "layer": layer, "singular_values": [9.0, 1.0]}
            file.write(json.dumps(row) + "\n")
    board.refresh()
    assert board.text.value.endswith("step = 40, busy in progress at step 40")
    assert pictures(board)["curves"] != before["curves"]
    assert pictures(board)["spectra"] != before["spectra"]


def test_a_step_that_was_chosen_stays_while_the_run_goes_on(tmp_path):
    run = write(tmp_path, "busy", steps=20, finished=False)
    board = Dashboard(Choice(str(tmp_path)))
    board.step.value = 0
    grow(run, 21, 30)
    board.refresh()
    assert "step = 0, busy in progress at step 30" in board.text.value


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def followers():
    return [t for t in threading.enumerate() if t.name == "follow" and t.is_alive()]


def test_follow_reads_again_until_it_is_switched_off(monkeypatch, tmp_path):
    monkeypatch.setattr(run_explorer, "PERIOD", 0.05)
    run = write(tmp_path, "busy", steps=20, finished=False)
    board = Dashboard(Choice(str(tmp_path)))
    board.follow.value = True
    assert all(thread.daemon for thread in followers())  # it ends with the kernel
    grow(run, 21, 25)
    wait_for(lambda: board.text.value.endswith("at step 25"))
    shutil.rmtree(run)  # it outlives what it follows
    wait_for(lambda: "it holds no runs" in board.text.value)
    board.follow.value = False
    wait_for(lambda: not followers())


def test_a_pattern_chooses_runs_and_a_wrong_one_is_refused(folder):
    assert run_explorer.select(str(folder), "full") == ("full-0", "full-1")
    assert run_explorer.select(str(folder), "") == ()
    with pytest.raises(InputError, match="not a regular expression"):
        run_explorer.select(str(folder), "(")


def test_headless_shows_a_line_and_what_was_drawn_beforehand(folder, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
    run_explorer.dashboard(Choice(str(folder)))
    names = [type(thing).__name__ for thing in shown]
    assert names == ["Markdown", "Drawing", "Slider", "Drawing"]
    steps = shown[2].texts
    assert (steps[0], steps[-1], steps[shown[2].start]) == ("step = 0", "step = 40", "step = 40")
    assert len(set(shown[2].images)) == len(steps)
