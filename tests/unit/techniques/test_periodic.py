"""`Periodic`: events at their steps, and refusals before training instead of at the first event."""

import copy

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lowrank_lab import factorize, optim
from lowrank_lab.techniques import Periodic, RecoveryLR


def factorized(kind="low-rank"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    factorize(model, kind, rank=3, target="0|2", init="kaiming")
    return model


def stepped(model, optimizer):
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def projecting(params):
    groups = [{"params": [p for p in params if p.ndim == 2], "rank": 1}]
    return optim.GaLore(groups)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "at least one from 1"),
        ({"reset_every": -1}, "reset_every: -1"),
        ({"reset_every": 1, "reset_strength": 2}, "reset_strength: 2"),
        ({"reset_every": 1, "reset_params": "some"}, "reset_params: 'some'"),
        ({"refactor_every": 1, "on_refactor": "keeep"}, "on_refactor: 'keeep'"),
        ({"refactor_every": 1, "refactor_basis": "any"}, "basis: 'any'"),
        ({"refactor_every": 1, "refactor_above": 1.5}, "refactor_above: 1.5"),
    ],
)
def test_values_that_are_not_allowed_are_refused_when_it_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        Periodic(**fields)


CASES = {
    "transport, Adafactor": ("low-rank", torch.optim.Adafactor, {"on_refactor": "transport"}),
    "transport, projected": ("low-rank", projecting, {"on_refactor": "transport"}),
    "reset of layers, one shared group": (
        "low-rank", pytorch_optimizer.Lion, {"on_refactor": "reset"}
    ),
    "reset of factors, one shared group": (
        "low-rank", pytorch_optimizer.Lion, {"reset_every": 1, "reset_params": "factors"}
    ),
    "merge, one shared group": ("lora", pytorch_optimizer.Lion, {"merge_every": 1}),
    "half a reset, NAdam": (
        "low-rank", torch.optim.NAdam, {"reset_every": 1, "reset_strength": 0.5}
    ),
}  # fmt: skip


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_its_first_event_would_refuse_is_refused_before_training_and_changes_nothing(
    case, begun
):
    kind, build, fields = CASES[case]
    model = factorized(kind)
    optimizer = build(list(model.parameters()))
    if begun:
        stepped(model, optimizer)
    periodic = Periodic(
        recovery=False, **({"refactor_every": 1} if "on_refactor" in fields else {}), **fields
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not allowed") as refused:
        periodic.check(model, optimizer, None)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="not allowed") as later:
        periodic.apply_(model, optimizer, None, 1)
    assert str(later.value) == str(refused.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_events_come_at_their_steps_in_order_and_the_scheduler_recovers():
    model = factorized("lora")
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    scheduler = RecoveryLR(optimizer, recovery_steps=3)
    periodic = Periodic(merge_every=4, refactor_every=2, reset_every=4)
    periodic.check(model, optimizer, scheduler)
    assert [periodic.due(n) for n in (0, 1, 2, 4)] == [
        [], [], ["refactor"], ["merge", "refactor", "reset"]
    ]  # fmt: skip
    assert periodic.apply_(model, optimizer, scheduler, 2) == ["refactor"]
    assert optimizer.param_groups[0]["lr"] == 0.1
    periodic.apply_(model, optimizer, scheduler, 4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.001)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"refactor_every": 1}, "no factorised layers"), ({"merge_every": 1}, "no LoRA layers")],
)
def test_a_model_without_such_layers_is_refused(fields, message):
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=message):
        Periodic(recovery=False, **fields).check(model, torch.optim.SGD(model.parameters()), None)
