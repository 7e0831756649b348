"""Tables over sizes agree with the accounts of single configurations."""

import pytest

from lowrank_lab import InputError, RunConfig, figures, simulate_memory
from lowrank_lab.config import SIZES
from lowrank_lab.memory.formulas import by_formula, flops_per_token
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.fit import of_method
from lowrank_lab.planning.sizes import duration, known_sizes, over_sizes, per_process

BASE = RunConfig(precision="bf16", rank=7)  # a rank of one size doesn't apply to others


def test_a_row_has_the_formulas_of_its_configuration_at_a_quarter_of_the_width():
    row = over_sizes(BASE, ["galore"], ["1b"]).iloc[0]
    config = resolve(of_method(RunConfig(model="1b", precision="bf16", rank=512), "galore"))
    assert row["rank"] == 512
    assert row["parameters"] == 1_339_082_752
    assert row["tokens"] == 20 * row["parameters"]
    assert row["optimizer_states"] == by_formula(config).optimizer_states
    assert row["flops"] == flops_per_token(config) * float(row["tokens"])


def test_all_large_sizes_have_rows_and_a_figure():
    names = known_sizes("60m")
    assert names == list(SIZES)[-len(names) :]
    assert names[0] == "60m"
    table = over_sizes(BASE, ["full-rank", "low-rank"], names)
    assert len(table) == 2 * len(names)
    alt = figures.alt_text(figures.memory_over_sizes(table, {"24 GB": 24e9}))
    assert "low-rank" in alt
    assert "24 GB" in alt


def test_an_unknown_size_is_refused():
    with pytest.raises(InputError, match="model"):
        over_sizes(BASE, ["galore"], ["2b"])


def test_a_process_has_the_bytes_of_its_simulation():
    config = of_method(RunConfig(model="tiny", batch=4, sequence_length=16), "low-rank")
    table = per_process(config, (1, 2))
    assert list(table.index) == [1, 2]
    one, two = (simulate_memory(config, "cuda", world_size=n) for n in (None, 2))
    assert table.loc[1, "peak"] == round(one.peak.total / 1e9, 2)
    assert table.loc[2, "weights"] == round(two.persistent.weights / 1e9, 2)
    assert table.loc[1, "gathered"] == 0


def test_a_world_size_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(InputError, match="world_size"):
        per_process(RunConfig(model="tiny", batch=4), (3,))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0.2 seconds"), (59, "59 seconds"), (756, "13 minutes"), (86400 * 6.3, "6.3 days"),
     (3.9e10, "1,200 years")],
)  # fmt: skip
def test_a_duration_has_two_digits_and_the_largest_unit(seconds, words):
    assert duration(seconds) == words
