"""One process of many: by formula, simulated, and measured in two processes."""

import sys

import pytest
from processes import measure_all
from short import QUICK

from lowrank_lab.config import RunConfig
from lowrank_lab.memory import simulate
from lowrank_lab.methods import METHODS
from lowrank_lab.ranks import of_ranks

IN_SHARDS = [name for name in QUICK if name != "relora"]


def fields_of(method, **changes):
    found = {"model": "tiny", "method": method, "batch": 4, "sequence_length": 32, "steps": 10_000}
    if METHODS[method].uses_rank and METHODS[method].rank is None:
        found["rank"] = 4
    if METHODS[method].layers:
        found |= {"refactor_every": 200, "reset_every": 200}
    return found | changes


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    jobs = [(name, fields_of(name, parallel="fsdp2")) for name in IN_SHARDS]
    return measure_all(jobs, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("method", IN_SHARDS)
def test_the_simulation_of_a_process_is_what_two_processes_measure(measured, method, rank):
    real = measured[method, rank]
    account = simulate(RunConfig(**fields_of(method)), ranks=2, rank=rank)
    simulated = {kind: trace.peak.total for kind, trace in account.steps.items()}
    ratios = {
        k: (round(v / real["live"][k], 4), round(v / real["allocated"][k], 4))
        for k, v in simulated.items()
    }
    sys.stdout.write(f"\n{method} {rank} {ratios} {account.at_rest.as_dict() == real['at_rest']}")
