"""One process of many: by formula and simulated. Measured in two processes: tests/slow."""

import pytest
import torch
import torch.distributed as dist
from processes import phase_peaks
from short import QUICK

import lowrank_lab as lab
from lowrank_lab import config as config_module
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.memory.hidden import cublas_bytes
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.fit import suggestions
from lowrank_lab.planning.fsdp import fake_rank, fullest, per_rank
from lowrank_lab.planning.simulate import simulate

AT_REST = ("weights", "frozen", "indices", "gradients", "optimizer_states", "projections")
MIB = 2**20


def configured(method, **changes):
    return RunConfig(**fields_of(method, **changes))


def fields_of(method, **changes):
    found = {"model": "tiny", "method": method, "batch": 6, "sequence_length": 8, "steps": 10_000}
    if METHODS[method].uses_rank and METHODS[method].rank is None:
        found["rank"] = 5
    return found | changes


def at_rest(breakdown):
    return {name: getattr(breakdown, name) for name in AT_REST}


@pytest.mark.parametrize("method", QUICK)
def test_formula_and_simulation_of_a_process_agree_to_the_byte(method):
    config = configured(method, precision="bf16")
    for ranks, rank in ((3, 2), (2, 1)):  # 3 divides no dimension of the model
        held = simulate(config, world_size=ranks, rank=rank).persistent
        assert at_rest(held) == at_rest(per_rank(resolve(config), ranks)[rank])


@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
@pytest.mark.parametrize("method", ["galore", "fira", "golore"])
def test_projections_leave_each_process_its_share_of_states(method, proj_type):
    options = {"proj_type": proj_type}
    config = configured(method, rank=4, method_options=options, batch=4)
    whole, shares = per_rank(resolve(config), 1)[0], per_rank(resolve(config), 2)
    assert at_rest(simulate(config, world_size=2, rank=1).persistent) == at_rest(shares[1])
    assert shares[0].projections == whole.projections // 2
    assert shares[0].optimizer_states == pytest.approx(whole.optimizer_states / 2, rel=1e-3)


@pytest.mark.parametrize(("ranks", "mebibytes"), [(1, 25_705), (8, 3213), (64, 402)])
def test_adam_s_states_at_7b_are_spread_over_all_processes(ranks, mebibytes):
    accounts = per_rank(resolve(RunConfig(model="7b", precision="bf16")), ranks)
    assert {round(each.optimizer_states / MIB) for each in accounts} == {mebibytes}


def test_owners_share_the_layers_that_are_updated_whole():
    config = RunConfig(model="7b", precision="bf16", method="muon")
    states = [each.optimizer_states for each in per_rank(resolve(config), 64)]
    whole = per_rank(resolve(config), 1)[0].optimizer_states
    assert sum(states) == pytest.approx(whole, rel=1e-5)  # AdamW's counters are on all ranks
    assert max(states) < 1.2 * min(states)
    assert per_rank(resolve(config), 64)[
        fullest(per_rank(resolve(config), 64))[0]
    ].optimizer_states == max(states)


def test_a_process_beyond_the_last_row_holds_padding_and_no_moments():
    config = configured("full-rank", batch=40)
    account = simulate(config, world_size=40, rank=39)  # the model's hidden size is 32
    assert at_rest(account.persistent) == at_rest(per_rank(resolve(config), 40)[39])
    assert (
        account.persistent.optimizer_states
        < simulate(config, world_size=40).persistent.optimizer_states
    )


def test_each_process_computes_its_share_of_the_batch():
    config = configured("full-rank", batch=8, sequence_length=64)
    one, four = (simulate(config, world_size=ranks) for ranks in (1, 4))
    assert four.steps["next"].kept.activations < 0.3 * one.steps["next"].kept.activations


def test_accumulated_gradients_are_whole():
    config = configured("full-rank", batch=16)
    at_once, pieces = (
        simulate(config.replace(gradient_accumulation=count), world_size=4).peak for count in (1, 2)
    )
    whole = 4 * at_once.weights
    assert at_once.gradients < whole
    assert pieces.gradients > 0.9 * whole


@pytest.mark.parametrize("method", ["full-rank", "galore"])
def test_shapes_of_all_shards_together_are_not_counted(method):
    account = simulate(configured(method), world_size=6)
    held = (
        account.persistent.weights
        + account.persistent.gradients
        + account.persistent.optimizer_states
    )
    for kind in ("next", "first"):
        assert phase_peaks(account.steps[kind])["clip"] < 1.1 * held


def test_whole_weights_are_gathered_and_given_back():
    trace = simulate(configured("full-rank"), world_size=2).steps["next"]
    gathered = trace.timeline()["gathered"]
    assert gathered.max() >= trace.peak.gathered > 0
    assert gathered[-1] == 0


def test_a_simulation_leaves_no_group_and_torch_as_it_was():
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    before = torch.UntypedStorage.resize_, dict(vars(ShardingPropagator))
    simulate(configured("full-rank"), world_size=2)
    with pytest.raises(InputError, match="world_size: 40 is not allowed; 14 layers"):
        simulate(configured("muon", batch=40), world_size=40)
    assert not dist.is_initialized()
    assert (torch.UntypedStorage.resize_, dict(vars(ShardingPropagator))) == before


def test_a_group_that_is_there_is_left_alone():
    with fake_rank(2, 1):
        with pytest.raises(InputError, match=r"^world_size: 2 is not .*this process belongs"):
            simulate(configured("full-rank"), world_size=2)
        assert dist.get_rank() == 1


@pytest.mark.parametrize(
    ("changes", "asked", "words"),
    [
        ({}, {"world_size": 0}, "world_size: 0 is not allowed; a number of processes, 1 or more"),
        ({}, {"world_size": 4}, "world_size: 4 is not allowed; batch 6 must be a multiple"),
        ({"gradient_accumulation": 2}, {"world_size": 2}, r"world_size × gradient_accumulation 2$"),
        ({}, {"world_size": 2, "rank": 2}, "rank: 2 is not allowed; 0 to 1"),
        ({"per_layer": True, "clip": 0.0}, {"world_size": 2}, "per_layer: True is not allowed"),
    ],
)
def test_what_processes_cannot_share_is_refused(changes, asked, words):
    with pytest.raises(InputError, match=words):
        lab.simulate_memory(configured("full-rank", **changes), **asked)


def test_ways_to_fit_are_those_that_shards_know():
    config = configured("full-rank", batch=8, sequence_length=64)
    cublas = cublas_bytes()  # it outweighs a tiny model
    peak = simulate(config, "cuda", world_size=2).peak.total
    capacity = cublas + int(0.6 * (peak - cublas))
    ways = suggestions(config, capacity, world_size=2)
    assert ways
    assert not any("--per-layer" in way.flags for way in ways)
    fitting = config.replace(**ways[-1].changes)
    assert ways[-1].peak == simulate(fitting, "cuda", world_size=2).peak.total


def test_ranks_is_the_earlier_name_of_world_size_and_warns(monkeypatch):
    monkeypatch.setattr(config_module, "_warned", set())
    config = configured("full-rank")
    with pytest.warns(FutureWarning, match="ranks is called world_size now"):
        earlier = simulate(config, ranks=2)
    assert earlier.peak == simulate(config, world_size=2).peak
