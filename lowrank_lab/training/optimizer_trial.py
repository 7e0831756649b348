"""A trial of the optimizer that a configuration names, before anything else is done."""

from __future__ import annotations

import torch
from torch import nn

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.methods.trial import stepped
from lowrank_lab.training.optimizer_state import Encoder

STEPS = 2
WIDTH = 32


def try_optimizer(config: ResolvedConfig, device: torch.device) -> None:
    """Take two steps of small weights, and see whether a checkpoint can have its states.

    Raises:
        InputError: the optimizer can't be made or can't step, for example without a closure, or
            has a state that a checkpoint can't have.
    """
    if config.optimizer is None:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        layer, embedding = nn.Linear(WIDTH, WIDTH, bias=False), nn.Embedding(2 * WIDTH, WIDTH)
        model = nn.ModuleList([layer, embedding, nn.RMSNorm(WIDTH)]).to(device, dtype)
        _, optimizer = stepped(config, model, STEPS)
    encoder = Encoder(model, optimizer)
    encoder.states()
    encoder.more()
