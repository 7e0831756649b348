"""Weights and states of methods by formula alone, with moments in 8 bits as well."""

import json

import pytest
from click.testing import CliRunner

from lowrank_lab.cli import main
from lowrank_lab.config import RunConfig
from lowrank_lab.memory.formulas import GB
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.planning.states import COLUMNS, states, text


def command(*arguments):
    return CliRunner().invoke(main, ["memory", *arguments])


@pytest.fixture(scope="module")
def rows():
    found = states(RunConfig(model="1b", rank=512, precision="bf16"))
    return {row["method"]: row for row in found}


def test_every_method_has_a_row_and_8_bits_where_it_has_the_choice(rows):
    assert list(rows) == list(METHODS)
    for name, row in rows.items():
        assert tuple(row) == COLUMNS
        assert (row["states_8bit"] is not None) is METHODS[name].eight_bit
        assert row["states_8bit"] is None or row["states_8bit"] < 0.65 * row["optimizer_states"]


def test_the_table_has_the_papers_bytes(rows):
    def held(name, states="optimizer_states"):
        return round((rows[name]["weights"] + rows[name][states]) / GB, 2)

    assert (held("low-rank"), held("galore"), held("full-rank")) == (3.66, 4.76, 8.03)
    assert held("low-rank", "states_8bit") == 2.46
    assert held("galore", "states_8bit") == 3.91


def test_a_configuration_that_a_method_refuses_is_a_row_that_says_so():
    config = RunConfig(model="tiny", rank=32, target=r"self_attn|lm_head")
    (row,) = states(config, ["low-rank"])
    assert row["refused"].startswith("target: ")
    assert row["refused"] in text([row])


def test_the_command_prints_one_method_or_all_without_a_simulation():
    one = command("--model", "7b", "--method", "galore", "--rank", "1024", "--formula", "--json")
    (row,) = json.loads(one.stdout)["methods"]
    assert row["optimizer_states"] / GB == pytest.approx(9.40, abs=0.01)
    table = command("--model", "tiny", "--all", "--formula").stdout
    assert [line.split()[0] for line in table.splitlines()] == ["GB", *METHODS]


@pytest.mark.parametrize("flag", [["--fits", "24GB"], ["--measure"], ["--world-size", "2"]])
def test_what_a_formula_can_not_say_is_refused_in_one_line(flag):
    found = command("--model", "tiny", "--formula", *flag)
    assert found.exit_code == 2
    assert found.stderr.strip().count("\n") == 0
    assert found.stderr.startswith(flag[0][2:].replace("-", "_"))


def test_narrow_activations_of_cola_are_counted():
    flags = ["--model", "60m", "--method", "cola", "--formula", "--json"]
    (whole,) = json.loads(command(*flags).stdout)["methods"]
    (narrow,) = json.loads(command(*flags, "--option", "recompute=true").stdout)["methods"]
    assert narrow["activations"] < 0.25 * whole["activations"]
    assert narrow["weights"] == whole["weights"]
