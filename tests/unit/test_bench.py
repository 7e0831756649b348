"""The benchmarks run, compare like with like, and say what they found."""

import importlib
import json

import pytest
from benchmarked import assert_rows_of
from click.testing import CliRunner
from paths import ROOT

from lowrank_lab.cli import main


@pytest.mark.parametrize("suite", ["imports", "layers", "many_matrices"])
def test_a_suite_runs_and_its_rows_have_what_others_rely_on(suite):
    assert_rows_of(suite)


def test_an_unknown_suite_is_refused_by_name():
    result = CliRunner().invoke(main, ["bench", "optimisers"])
    assert result.exit_code == 2
    assert "optimisers" in result.output


def test_what_misses_its_target_says_what_its_floor_allows_and_where_time_goes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    shortfalls = importlib.import_module("benchmarks.run").shortfalls

    row = {
        "peer": 114.0,
        "floor": 57.0,
        "unit": "ms",
        "peer_name": "x",
        "note": "our time: products 63 %",
    }
    speed = {
        "peer": 10.0,
        "floor": 30.0,
        "unit": "tokens/s",
        "peer_name": "x",
        "note": "our time: loss 14 %",
    }
    bound = {
        "peer": None,
        "floor": 3.0,
        "unit": "ms",
        "peer_name": "y",
        "note": "our time: products 90 %",
    }
    rows = [{"name": "a", "met": False, **row}, {"name": "b", "met": True, **row},
            {"name": "c", "met": None, **row}, {"name": "d", "met": False, **speed},
            {"name": "e", "met": False, **bound}]  # fmt: skip
    assert shortfalls(rows)[3:] == [
        "* a, against x: at its floor it would be 2.00; of our time products 63 %.",
        "* d, against x: at its floor it would be 3.00; of our time loss 14 %.",
        "* e, against y: products 90 %.",
    ]
    assert shortfalls([rows[1]]) == []


def test_the_book_shows_the_results_that_are_kept():
    text = (ROOT / "docs" / "results" / "speed.md").read_text().partition("<!-- benchmarks -->")[2]
    shown = text.partition("<!-- /benchmarks -->")[0]
    for row in json.loads((ROOT / "benchmarks" / "results.json").read_text())["rows"]:
        if row["target"]:
            (line,) = (x for x in shown.splitlines() if x.startswith(f"| {row['name']} |")
                       and f"| {row['peer_name']} |" in x)  # fmt: skip
            assert line.endswith("| met |" if row["met"] else "| not met |")
            assert f"| {row['ratio']:.2f} |" in line
        assert (f"* {row['name']}, against {row['peer_name']}: " in shown) == (row["met"] is False)


def test_rows_of_another_kind_of_machine_are_kept_beside_the_others(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    running = importlib.import_module("benchmarks.run")
    monkeypatch.setattr(running, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(running, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(running, "draw", lambda rows: None)
    marks = "\n".join([*running.TABLE, *running.KINDS])
    running.PAGE.write_text(f"before\n{marks}\nafter\n")

    def machine(model, versions):
        lscpu = {"CPU family": "25", "Model": model, "emulated": {"X": "avx2"}}
        return {"cpu": "AMD", "capability": "AVX2", "cores": 2, "lscpu": lscpu, "v": versions}

    def row(name, ratio):
        return {"name": name, "peer_name": "", "ours": 1.0, "peer": 1.0, "floor": 2.0, "note": "",
                "unit": "ms", "ratio": ratio, "target": "≥ 1", "met": True}  # fmt: skip

    def keep(facts, *rows):
        running._keep({"machine": facts, "rows": [*rows]}, part=True)
        return json.loads(running.RESULTS.read_text())

    first, other = machine("1", "a"), machine("2", "a")
    keep(first, row("old", 1.0))
    keep(other, row("new", 2.0))
    kept = keep(other, row("newer", 3.0))
    assert [r["name"] for r in kept["rows"]] == ["old"]
    kind = "AMD, family 25 model 2 (AVX2, emulated)"
    assert [r["name"] for r in kept["machines"][kind]["rows"]] == ["new", "newer"]
    kept = keep(machine("2", "b"), row("newest", 4.0))  # other packages: nothing is mixed
    assert [r["name"] for r in kept["machines"][kind]["rows"]] == ["newest"]
    kept = keep(first, row("old", 5.0))
    assert kept["rows"][0]["ratio"] == 5.0
    assert list(kept["machines"]) == [kind]
    page = running.PAGE.read_text()
    assert f"**{kind}**" in page
    assert "`X=avx2`" in page
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")


def test_the_book_shows_every_kind_of_machine_that_is_kept():
    text = (ROOT / "docs" / "results" / "speed.md").read_text().partition("<!-- machines -->")[2]
    kinds = json.loads((ROOT / "benchmarks" / "results.json").read_text()).get("machines", {})
    for kind, kept in kinds.items():
        shown = text.partition(f"**{kind}**")[2].partition("\n**")[0]
        for row in kept["rows"]:
            assert f"| {row['name']} |" in shown
            assert f"| {row['ratio']:.2f} |" in shown
