"""What SCALE alone has: roles of parameters in a model, rates of AdamW's groups, and bfloat16."""

import pytest
import torch
from small_matrices import TALL, noisy_gradients, relative
from torch import nn
from write_golden import tiny

from lowrank_lab import optim
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 6, bias=False))
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def roles(groups):
    return {
        name: (group.get("norm_dim"), group.get("momentum"))
        for group in groups
        for name in group["param_names"]
    }


def test_groups_of_a_model_normalize_matrices_and_average_the_head():
    adam = dict.fromkeys(("block.0.bias", "block.1.weight", "block.1.bias"), (None, None))
    matrices = dict.fromkeys(("block.0.weight", "block.2.weight"), (1, None))
    expected = {"embed.weight": (0, None), "lm_head.weight": (1, 0.9), **matrices, **adam}
    assert roles(optim.scale_groups(Model())) == expected
    del expected["lm_head.weight"]
    assert roles(optim.scale_groups(Model(tied=True))) == expected


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert roles(optim.scale_groups(model)) == {"weight": (1, 0.9)}


@pytest.mark.parametrize("target", [None, "q_proj", "q_proj|lm_head"])
def test_a_run_normalizes_targets_embedding_and_head_alone(target):
    config = resolve(tiny("scale", **({"target": target} if target else {})))
    model, optimizer = build(config)
    found = {}
    for group in optimizer.param_groups:
        found |= {id(p): (group.get("norm_dim"), group.get("momentum")) for p in group["params"]}
    names = {name: found[id(p)] for name, p in model.named_parameters()}
    assert names.pop("model.embed_tokens.weight") == (0, 0.0)
    assert names.pop("lm_head.weight") == (1, 0.9)
    for name, role in names.items():
        hidden = "q_proj" in name if target else "_proj" in name
        assert role == ((1, 0.0) if hidden else (None, None)), name


def test_the_rate_of_adamw_is_a_multiple_of_the_groups():
    steps = []
    for scale, lr in ((5.0, 0.01), (1.0, 0.05)):
        b = nn.Parameter(torch.ones(4))
        optimizer = optim.Scale([b], lr=lr, adam_scale=scale, weight_decay=0.1)
        for G in noisy_gradients((4,), 5):
            b.grad = G
            optimizer.step()
        steps.append(b.detach())
    assert torch.equal(*steps)


def test_every_row_of_a_step_has_the_learning_rate_as_root_mean_square():
    W = nn.Parameter(torch.zeros(TALL))
    optimizer = optim.Scale([{"params": [W], "norm_dim": 1}], lr=0.01)
    (W.grad,) = noisy_gradients(TALL, 1)
    optimizer.step()
    assert W.detach().square().mean(1).sqrt() == pytest.approx(0.01, rel=1e-5)
    assert not any(isinstance(v, torch.Tensor) for v in optimizer.state[W].values())


def test_steps_in_bfloat16_are_those_of_float32_up_to_rounding():
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        W = nn.Parameter(torch.zeros(TALL, dtype=dtype))
        optimizer = optim.Scale([{"params": [W], "norm_dim": 1, "momentum": 0.9}], lr=0.01)
        for G in noisy_gradients(TALL, 20):
            W.grad = G.to(dtype)
            optimizer.step()
        ends.append(W.detach().float())
    assert relative(ends[1], ends[0]) < 0.02
