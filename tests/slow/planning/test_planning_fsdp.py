"""Two processes measure what is simulated."""

import shutil
import sys

import pytest
from processes import CLOSE, SIZE, measure_all
from short import QUICK

from lowrank_lab.config import RunConfig
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.planning.simulate import simulate


def fields_of(method):
    found = {"model": "tiny", "method": method, "batch": 4, "sequence_length": 8, "steps": 10_000}
    found["parallel"] = "fsdp2"
    if METHODS[method].uses_rank and METHODS[method].rank is None:
        found["rank"] = 5
    if METHODS[method].has_products:
        found |= {"refactor_every": 200, "reset_every": 200}
    return found


PARTS = 4  # one would take longer than all other slow tests beside it
NAMES = [*QUICK, *(["adamw-8bit"] if shutil.which("g++") else [])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [NAMES[part::PARTS] for part in range(PARTS)], ids="-".join)
def test_two_processes_measure_what_is_simulated_of_each(names, tmp_path):
    simulated, jobs = {}, {}
    for name in names:
        config = RunConfig(**fields_of(name))
        of_ranks = [simulate(config, world_size=SIZE, rank=rank) for rank in range(SIZE)]
        simulated |= {(name, rank): account for rank, account in enumerate(of_ranks)}
        peaks = [{k: t.peak.total for k, t in account.steps.items()} for account in of_ranks]
        jobs[name] = fields_of(name) | {"expected": peaks}
    lines, worst = [], 0.0
    for (name, rank), real in sorted(measure_all(jobs.items(), tmp_path).items()):
        assert simulated[name, rank].persistent.as_dict() == real["at_rest"]
        ratios = {k: n / real["allocated"][k] for k, n in jobs[name]["expected"][rank].items()}
        if name != "adamw-8bit":  # its own temporaries are left out
            worst = max([worst, *(abs(ratio - 1) for ratio in ratios.values())])
        lines += [f"{name:12} {rank}  " + ", ".join(f"{k} {r:.4f}" for k, r in ratios.items())]
    title = "simulated / allocated at the peak, by process and kind of step; at rest equal"
    sys.stdout.write("\n".join(["", title, *lines, ""]))
    assert worst < CLOSE
