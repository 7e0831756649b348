"""What fits on a card, what would make it fit, and `lowrank-lab memory`."""

import json

import pytest
from click.testing import CliRunner

from lowrank_lab.cli import main
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.memory.hidden import cublas_bytes
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning import describe, fit
from lowrank_lab.planning.simulate import simulate
from lowrank_lab.widgets import notebook

SMALL = {"model": "tiny", "precision": "bf16", "steps": 10_000, "batch": 8, "sequence_length": 64}


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5mb", 1_500_000), ("100", 100)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert fit.bytes_of(text) == size


@pytest.mark.parametrize("text", ["24XB", "", "GB", "-1GB", "0", "1e9", "24 GB card"])
def test_other_sizes_are_refused_with_what_is_allowed(text):
    with pytest.raises(InputError, match="24GiB"):
        fit.bytes_of(text)


def test_another_method_takes_what_applies_to_it():
    config = RunConfig(
        **SMALL, method="low-rank", rank=4, init="spectral", refactor_every=10, reset_every=10
    )
    galore = fit.of_method(config, "galore")
    assert (galore.rank, galore.reset_every) == (4, 10)
    assert (galore.refactor_every, galore.init) == (0, None)
    assert resolve(fit.of_method(config, "full-rank")).rank is None
    assert resolve(fit.of_method(config, "apollo-mini")).rank == 1  # it has one of its own
    assert fit.of_method(config, "low-rank").refactor_every == 10


def test_what_no_method_could_do_is_still_refused():
    with pytest.raises(InputError, match="rank"):
        fit.of_method(RunConfig(**SMALL, rank=1000), "galore")


def test_the_first_way_that_fits_ends_the_search_and_does_fit():
    config = RunConfig(**SMALL, method="galore", rank=4)
    whole = simulate(config, "cuda").peak.total
    cublas = cublas_bytes()  # it outweighs a tiny model
    ways = fit.suggestions(config, cublas + int(0.7 * (whole - cublas)))
    assert ways[-1].fits
    assert not any(way.fits for way in ways[:-1])
    assert ways[-1].peak == simulate(config.replace(**ways[-1].changes), "cuda").peak.total
    assert ways[-1].flags.startswith("--activation-checkpointing")


def test_nothing_fits_into_less_than_the_weights():
    config = RunConfig(**SMALL, method="full-rank")
    ways = fit.suggestions(config, 1000)
    assert ways
    assert not any(way.fits or way.report for way in ways)


def test_a_way_changes_nothing_that_is_so_already():
    config = RunConfig(**SMALL, method="full-rank", activation_checkpointing=True)
    for way in fit.suggestions(config, simulate(config, "cuda").peak.total - 50_000):
        assert "--activation-checkpointing" not in way.flags


def invoke(*args):
    return CliRunner().invoke(main, ["memory", *args])


def test_the_command_prints_bytes_at_the_top_level_of_its_json():
    done = invoke("--model", "9m", "--method", "galore", "--rank", "16", "--batch", "2", "--json")
    found = json.loads(done.stdout)
    assert found["precision"] == "bf16"
    assert found["weights"] == 2 * 8_995_968
    assert found["optimizer_states"] == found["formula"]["optimizer_states"]
    assert 0 < found["projections"] < found["optimizer_states"]
    assert found["peak"] == max(found["peak_of_steps"].values()) > found["weights"]


def test_the_paper_s_sizes_at_1b():
    table = describe.of_sizes("bf16")["1b, r 512"]
    assert table["low-rank"] == pytest.approx(3.66, abs=0.005)
    assert table["galore"] == table["fira"] == pytest.approx(4.76, abs=0.005)
    assert table["full-rank"] == pytest.approx(8.03, abs=0.005)


def test_a_rank_for_full_rank_is_accepted():
    done = invoke("--model", "tiny", "--rank", "4", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["rank"] is None


def test_the_command_says_whether_it_fits_and_what_would():
    flags = ["--model", "tiny", "--method", "galore", "--rank", "4", "--batch", "8"]
    peak = json.loads(invoke(*flags, "--json").stdout)["peak"]
    assert "fits in" in invoke(*flags, "--fits", f"{2 * peak}").stdout
    text = invoke(*flags, "--fits", f"{peak - 1}").stdout
    assert "does not fit" in text
    assert "--activation-checkpointing" in text


def test_per_layer_updates_need_no_word_about_clipping():
    done = invoke("--model", "tiny", "--method", "galore", "--rank", "4", "--per-layer", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["gradients"] == 2 * 512 * 32  # the largest


def test_measured_bytes_stand_beside_the_simulated_ones():
    done = invoke("--model", "tiny", "--batch", "2", "--device", "cpu", "--measure", "--json")
    found = json.loads(done.stdout)
    assert found["measured"]["peak"] == found["peak"]
    ratios = found["measured"]["simulated_over_allocated"]
    assert list(ratios) == ["first", "next"]
    assert all(abs(ratio - 1) < 0.03 for ratio in ratios.values())


@pytest.mark.parametrize(
    ("products", "precision", "model", "batch", "measured"),
    [
        ("dots", "bf16", "9m", 16, True), ("emulation", "fp32", "9m", 16, True),
        ("emulation", "bf16", "tiny", 4, True), ("emulation", "bf16", "9m", 4, False),
        ("tiles", "bf16", "9m", 64, False), ("tiles", "bf16", "60m", 16, False),
    ],
)  # fmt: skip
def test_a_step_is_measured_beside_the_sliders_where_it_takes_seconds(
    products, precision, model, batch, measured, monkeypatch
):
    monkeypatch.setattr("lowrank_lab.device.bf16_products", lambda: products)
    config = RunConfig(model=model, precision=precision, batch=batch)
    assert notebook._measurable(resolve(config)) is measured


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--fits", "much"], "fits"), (["--model", "8b"], "model"), (["--rank", "0"], "rank"),
        (["--method", "galor"], "galore"),
        (["--model", "tiny", "--method", "galore", "--rank", "99"], "rank"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_that_names_it(flags, named):
    done = invoke(*flags)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


def test_tables_for_notebooks_hold_what_the_accounts_say():
    config = RunConfig(**SMALL, method="galore", rank=4)
    account = simulate(config)
    peaks = describe.peaks(account)
    assert list(peaks["step"]) == list(account.steps)
    assert peaks["peak (GB)"].max() == pytest.approx(account.peak.total / 1e9, abs=1e-4)
    largest = describe.largest(account.steps["next"])
    assert list(largest["MB"]) == sorted(largest["MB"], reverse=True)
    checked = describe.checked(config)
    assert (checked["simulated / measured"] - 1).abs().max() < 0.03
    compared = describe.compared({"galore": account})
    assert compared["peak"].item() == account.peak.total
    assert describe.readable(compared)["label"].tolist() == ["galore"]
    ways = describe.suggestions(config, account.peak.total * 2 + cublas_bytes())
    assert ways.iloc[0, 2] == "yes"
