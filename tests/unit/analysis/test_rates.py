"""How far a rate may be off, from losses whose answer is known."""

import math

import pandas as pd
import pytest

from lowrank_lab.analysis.rates import robustness


def finals(*losses, label="a"):
    """One run per rate: 1, 2, 4, …"""
    rates = [2.0**i for i in range(len(losses))]
    labels = [f"{label}, lr {rate:g}" for rate in rates]
    return pd.DataFrame({"label": labels, "lr": rates, "validation_loss": losses})


def test_the_width_is_that_of_the_parabola_where_the_losses_lie_on_one():
    (row,) = robustness(finals(3.08, 3.0, 3.08), within=0.02).to_dict("records")
    assert (row["best rate"], row["validation loss"], row["rates"]) == (2.0, 3.0, 3)
    assert row["down"] == row["up"] == pytest.approx(2**0.5)  # a quarter of 0.08: half of the way
    assert row["width"] == pytest.approx(2)
    assert math.isnan(row["diverges at"])


def test_a_rate_far_above_makes_the_width_no_wider_than_the_rate_before_it():
    (row,) = robustness(finals(3.08, 3.0, 3.03, 9.0), within=0.02).to_dict("records")
    assert 2**0.5 < row["up"] < 2
    assert row["diverges at"] == 8.0


def test_a_rate_diverges_where_its_loss_is_half_a_nat_above_the_best():
    (row,) = robustness(finals(3.1, 3.0, 3.49, 3.51)).to_dict("records")
    assert row["diverges at"] == 8.0


def test_a_side_on_which_nothing_bad_was_tried_is_not_known():
    (row,) = robustness(finals(3.01, 3.0, 3.1)).to_dict("records")
    assert math.isnan(row["down"])
    assert math.isnan(row["width"])
    assert math.isnan(row["diverges at"])
    share = math.log2(row["up"])  # the cubic that is flat at the best, with the slope at its end
    assert 0.145 * share**2 - 0.045 * share**3 == pytest.approx(0.02)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_ends_the_width_at_the_last_good_rate(bad):
    (row,) = robustness(finals(3.5, 3.0, 3.01, bad)).to_dict("records")
    assert row["up"] == pytest.approx(2.0)
    assert row["diverges at"] == 8.0


def test_labels_with_fewer_than_three_rates_have_no_row_and_the_best_label_is_first():
    table = pd.concat(
        [finals(3.0, 2.9), finals(3.0, 2.9, 3.1, label="b"), finals(3.0, 2.8, 3.1, label="c")]
    )
    assert robustness(table)["label"].tolist() == ["c", "b"]
