"""The loss on a fixed block of held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowrank_lab import distributed
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.splits import Split
from lowrank_lab.models.llama import Llama
from lowrank_lab.techniques.states import switching
from lowrank_lab.training.gradients import autocast


@contextmanager
def evaluation_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block, the weights that the optimizer wants to be evaluated and published.

    Schedule-free optimizers train at one point and average at another; their `eval()` and `train()`
    switch between the two. The training weights come back bit by bit, which `train()` alone would
    round. A no-op for all other optimizers.
    """
    switches = switching(optimizer)
    kept = [p.detach().clone() for p in model.parameters()] if switches else []
    for switch in switches:
        switch.eval()
    try:
        yield
    finally:
        for switch in switches:
            switch.train()
        with torch.no_grad():
            for p, before in zip(model.parameters() if switches else (), kept, strict=True):
                p.copy_(before)


@torch.no_grad()
def evaluate(
    model: Llama, corpus: Corpus, split: Split, tokens: int, config: ResolvedConfig
) -> float:
    """Mean loss in nats per token on a fixed block: the first windows of a split, about `tokens`
    long.

    Weighted by tokens, so that a smaller last batch counts for less.
    """
    length = config.sequence_length
    count = min(corpus.num_windows(split, length), max(1, tokens // length))
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # of losses and tokens
    training = model.training
    model.eval()
    rank, processes = distributed.rank(), distributed.world_size()
    for start in range(0, count, config.batch):
        own = torch.arange(start + rank, min(start + config.batch, count), processes)
        # Every process computes in every turn, as a sharded model needs all of them; and compiled
        # blocks take batches of one size only.
        size = config.batch // processes if config.compile else max(1, len(own))
        indices = torch.nn.functional.pad(own, (0, size - len(own)), value=start).numpy()
        inputs, targets = (t.to(device) for t in corpus.windows(split, indices, length))
        with autocast(config, device):
            loss = model.loss(inputs, targets[: max(1, len(own))]).double()
        tokens_here = len(own) * length
        totals += torch.stack([loss * tokens_here, torch.full_like(loss, tokens_here)])
    model.train(training)
    total, seen = distributed.all_reduce_sum_(totals).tolist()
    return float(total / seen)
