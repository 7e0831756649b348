"""What runs need, held against simulations and against real folders; what the machine has."""

import pytest

from lowrank_lab.config import RunConfig
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning import resources
from lowrank_lab.planning.simulate import simulate
from lowrank_lab.training.loop import train

SMALL = {"model": "tiny", "sequence_length": 16, "batch": 2, "vocab_size": 300, "steps": 40}


@pytest.mark.parametrize("method", ["full-rank", "low-rank", "relora", "sltrain", "fira", "muon"])
@pytest.mark.parametrize("length", [16, 256])
def test_the_quick_estimate_is_above_the_simulation_but_not_far(method, length):
    config = resolve(RunConfig(**SMALL | {"sequence_length": length}, method=method))
    quick = resources.resources_of(config).memory - resources.PROCESS_BYTES
    simulated = simulate(config).peak.total
    assert simulated <= quick <= 2 * simulated


def test_large_models_are_simulated(monkeypatch):
    monkeypatch.setattr(resources, "QUICK_BYTES", 0)
    config = resolve(RunConfig(**SMALL))
    need = resources.resources_of(config)
    assert need.source == "simulated"
    assert need.memory == resources.PROCESS_BYTES + simulate(config).peak.total


@pytest.mark.parametrize("method", ["full-rank", "low-rank"])
def test_pieces_after_the_second_need_no_memory_and_no_simulation(monkeypatch, method):
    monkeypatch.setattr(resources, "QUICK_BYTES", 0)
    config = resolve(RunConfig(**SMALL | {"batch": 16}, method=method, gradient_accumulation=8))
    whole = simulate(config, "cuda").peak.total
    assert resources.resources_of(config, cuda=True).device == pytest.approx(
        whole, abs=16 * 16 * 16
    )
    short = simulate(config.replace(batch=4, gradient_accumulation=2), "cuda").peak.total
    assert resources.resources_of(config, cuda=True).device == short


def test_a_cuda_device_can_be_asked_about_where_there_is_none():
    need = resources.resources_of(resolve(RunConfig(**SMALL)), cuda=True)
    assert need.memory == 2 * resources.PROCESS_BYTES < need.memory + need.device


def test_flops_of_a_run_grow_with_its_tokens_and_pass_over_embeddings():
    config = resolve(RunConfig(**SMALL))
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 88) + 300 * 32
    attention = 2 * 16 * 32  # layers × length × width
    assert resources.resources_of(config).flops == 6 * (matrices + attention) * 40 * 2 * 16


def test_weights_and_states_are_those_of_the_formula():
    config = resolve(RunConfig(**SMALL, method="fira"))
    found = by_formula(config)
    assert resources.resources_of(config).held == found.weights + found.optimizer_states


def test_a_configuration_is_simulated_once_for_all_its_seeds_and_learning_rates(monkeypatch):
    seen = []
    monkeypatch.setattr(
        resources, "resources_of", lambda config, cuda: seen.append(config) or len(seen)
    )
    configs = [resolve(RunConfig(**SMALL, seed=s, lr=lr)) for s in (0, 1) for lr in (1e-3, 2e-3)]
    configs.append(resolve(RunConfig(**SMALL | {"batch": 4})))
    assert list(resources.resources_of_each(configs)) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("method", ["full-rank", "galore", "low-rank"])
def test_disk_is_estimated_above_what_a_run_takes_but_not_far(tmp_path, text_corpus, method):
    config = resolve(RunConfig(**SMALL, corpus=text_corpus, method=method, checkpoint_every=10))
    most = []

    def watch(row):
        most.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))

    train(config, tmp_path, on_step=watch)
    watch(None)
    estimated = resources.resources_of(config).disk - resources.NOTEBOOK_BYTES
    assert max(most) <= estimated <= 4 * max(most)
    kept = resources.resources_of(config).kept - resources.NOTEBOOK_BYTES
    assert most[-1] <= kept <= 4 * most[-1]


def test_a_configuration_whose_states_nobody_knows_has_needs(text_corpus):
    config = resolve(RunConfig(**SMALL, corpus=text_corpus, optimizer="torch.optim.NAdam"))
    assert resources.resources_of(config).memory > resources.PROCESS_BYTES


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    here = resources.machine_memory()
    for name, limit, expected in (("a", "123456789\n", 123456789), ("b", "max\n", here)):
        (tmp_path / name).write_text(limit)
        monkeypatch.setattr(resources, "_limit_files", lambda path=tmp_path / name: [path])
        assert resources.machine_memory() == expected


def test_free_disk_is_that_of_the_folder_that_will_be(tmp_path):
    assert resources.free_disk(tmp_path / "not" / "yet") == pytest.approx(
        resources.free_disk(tmp_path), rel=0.1
    )
