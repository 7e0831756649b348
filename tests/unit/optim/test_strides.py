"""Tensors of any layout in memory: the fused kernel walks through it, whatever the strides are."""

import pytest
import torch
from torch import nn

from lowrank_lab import optim

BUILDERS = {
    "adamw": lambda p: optim.ProjectedAdamW([p], lr=0.1),
    "precise": lambda p: optim.ProjectedAdamW([p], lr=0.1, state_precision="fp32"),
    "spam": lambda p: optim.Spam([p], lr=0.1, grad_accu_steps=1),
    "stable-spam": lambda p: optim.StableSpam([p], lr=0.1),
    "galore": lambda p: optim.GaLore([{"params": [p], "rank": 2}], lr=0.1),
    "fira": lambda p: optim.Fira([{"params": [p], "rank": 2}], lr=0.1),
    "apollo": lambda p: optim.Apollo([{"params": [p], "rank": 2}], lr=0.1),
}
every_builder = pytest.mark.parametrize("name", BUILDERS)


def gradients(shape=(6, 4), steps=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def trained(name, start, grads):
    p = nn.Parameter(start)
    optimizer = BUILDERS[name](p)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach()


@every_builder
def test_a_transposed_gradient_is_the_same_gradient(name):
    grads = gradients()
    expected = trained(name, torch.ones(6, 4), grads)
    turned = [grads[0], *(g.T.contiguous().T for g in grads[1:])]
    torch.testing.assert_close(trained(name, torch.ones(6, 4), turned), expected)


@every_builder
def test_a_gradient_that_is_one_number_seen_many_times_is_read_as_such(name):
    grads = [g[:1, :1].expand(6, 4) for g in gradients()]
    expected = trained(name, torch.ones(6, 4), [g.contiguous() for g in grads])
    assert torch.equal(trained(name, torch.ones(6, 4), grads), expected)


@every_builder
def test_a_weight_with_gaps_in_memory_is_updated_and_the_gaps_are_not(name):
    expected = trained(name, torch.ones(6, 4), gradients())
    whole = torch.full((6, 8), 7.0)
    whole[:, ::2] = 1.0
    assert torch.equal(trained(name, whole[:, ::2], gradients()), expected)
    assert torch.equal(whole[:, 1::2], torch.full((6, 4), 7.0))


@pytest.mark.parametrize("build", [optim.ProjectedAdamW, optim.Spam, optim.StableSpam])
def test_training_goes_on_through_a_change_to_channels_last(build):
    def weights(change):
        torch.manual_seed(0)
        net, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
        optimizer = build(net.parameters(), lr=0.1)
        for step in range(5):
            if change and step == 2:
                net.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return net.weight.detach()

    torch.testing.assert_close(weights(True), weights(False))


RANKED = {
    "galore": optim.GaLore, "fira": optim.Fira,
    "golore": lambda groups: optim.GoLore([groups[0] | {"switch": 9}]),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("good", [0, 2])
def test_a_step_that_fails_leaves_the_state_as_it_was(name, good):
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = RANKED[name]([{"params": [p], "rank": 2, "update_proj_gap": 1}])
    for grad in gradients(steps=good):
        p.grad = grad
        optimizer.step()
    before = str(optimizer.state_dict()["state"].get(0))
    p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert str(optimizer.state_dict()["state"].get(0) or None) == before
    again = RANKED[name]([{"params": [p], "rank": 2, "update_proj_gap": 1}])
    again.load_state_dict(optimizer.state_dict())
