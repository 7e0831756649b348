"""What a simulated process sends is what FSDP2 and the updates have to send, byte by byte."""

import pytest

from lowrank_lab import InputError, RunConfig
from lowrank_lab.config import SIZES
from lowrank_lab.planning.fit import of_method
from lowrank_lab.planning.traffic import traffic

RANK, WORLD = 8, 2
CONFIG = RunConfig(model="tiny", rank=RANK, precision="bf16", batch=4, sequence_length=16)
D, MLP, _, LAYERS, V = SIZES["tiny"]
IN_BLOCKS = 2 * LAYERS * (4 * D * D + 3 * D * MLP + 2 * D)
AROUND = 2 * (2 * V * D + D)


def sent(method, world_size=WORLD):
    table = traffic(of_method(CONFIG, method), world_size)
    return table.set_index(["step", "collective"])["bytes"]


def test_full_rank_gathers_blocks_twice_and_sums_every_gradient_once():
    found = sent("full-rank")
    assert found["next", "all gather"] == (2 * IN_BLOCKS + AROUND) // 2
    assert found["next", "reduce scatter"] == (IN_BLOCKS + AROUND) // 2
    assert found["next"].drop(["all gather", "reduce scatter"]).max() < 1000  # norms


def test_factors_travel_in_place_of_weights():
    factors = 2 * LAYERS * (4 * 2 * D * RANK + 3 * (D + MLP) * RANK + 2 * D)
    found = sent("low-rank")
    assert found["next", "all gather"] == (2 * factors + AROUND) // 2
    assert found["next", "reduce scatter"] == (factors + AROUND) // 2


def test_galore_sends_its_projections_in_addition():
    projections = 2 * LAYERS * 7 * D * RANK
    more = sent("galore")["next"] - sent("full-rank")["next"]
    assert more["all gather"] == projections // 2
    assert more["reduce scatter"] == 0


def test_a_single_process_sends_nothing():
    assert not sent("full-rank", 1).any()


def test_an_impossible_world_size_is_refused():
    with pytest.raises(InputError, match="world_size"):
        traffic(CONFIG, 3)
