"""DDP of a model's loss: the gradients and the names of one process."""

import pytest
import torch
import torch.distributed as dist

from lowrank_lab import RunConfig
from lowrank_lab.methods.build import build_model
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training import ddp, gradients, step
from lowrank_lab.training.peaks import PeakMemory

SMALL = {"model": "tiny", "corpus": "markov", "batch": 4, "sequence_length": 8, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_process(tmp_path, monkeypatch):
    """A process group of one, in which DDP is used all the same."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(gradients, "averages_in_backward", lambda config: True)
    yield
    dist.destroy_process_group()


def parts(method="low-rank", pieces=1):
    config = resolve(RunConfig(**SMALL, method=method, gradient_accumulation=pieces))
    tokens = torch.arange(64).remainder(config.size.vocab_size).view(2, 4, 8)
    batches = list(zip(tokens[0].chunk(pieces), tokens[1].chunk(pieces), strict=True))
    return build_model(config), batches, config


def all_gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("method", ["full-rank", "low-rank", "lora", "sltrain"])
def test_gradients_are_those_without_ddp(method, pieces):
    model, batches, config = parts(method, pieces)
    expected = gradients.gradients(model, batches, config), all_gradients(model)
    model.zero_grad(set_to_none=True)
    names = list(model.state_dict())
    replicas = gradients.replicate(model, lambda: batches, config)
    assert list(model.state_dict()) == names
    assert all(p.grad is None for p in model.parameters())  # of the rehearsal
    for _ in range(2):
        found = gradients.gradients(model, batches, config, replicas=replicas), all_gradients(model)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        model.zero_grad(set_to_none=True)


def test_buckets_are_allocated_once_and_count_as_gradients():
    model, batches, config = parts()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    replicas = gradients.replicate(model, lambda: batches, config)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    storages = {b.untyped_storage().data_ptr() for b in replicas.buckets}
    assert sum(b.untyped_storage().nbytes() for b in replicas.buckets) == trained
    for _ in range(2):
        gradients.gradients(model, batches, config, replicas=replicas)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert {g.untyped_storage().data_ptr() for g in grads} == storages
        model.zero_grad(set_to_none=True)
    peaks = PeakMemory(model, optimizer, trackable=True, buckets=replicas.buckets)
    with peaks.of_step("next", first=True):
        step.take_step_(model, optimizer, batches, config, 1, replicas=replicas)
    assert peaks.kept.gradients == trained


def test_parameters_without_a_gradient_are_allowed():
    model, batches, config = parts()
    model.unused = torch.nn.Parameter(torch.ones(3))
    replicas = gradients.replicate(model, lambda: batches, config)
    for _ in range(3):
        gradients.gradients(model, batches, config, replicas=replicas)
        assert model.unused.grad is None
        assert model.lm_head.weight.grad is not None
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("fields", "used"),
    [
        ({}, True),
        ({"parallel": "fsdp2"}, False),
        ({"per_layer": True, "clip": 0.0}, False),
        ({"method": "relora", "method_options": {"warm_start": 4, "merge_every": 8}}, False),
    ],
)
def test_what_forbids_ddp_averages_after_the_backward_pass(fields, used, monkeypatch):
    config = resolve(RunConfig(**SMALL | {"steps": 20} | fields))
    assert not ddp.averages_in_backward(config)  # one process
    monkeypatch.setattr(ddp.distributed, "world_size", lambda: 2)
    assert ddp.averages_in_backward(config) == used
