"""One training step: forward, loss, backward, clipping, optimizer, events. What `train` loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.config import RunConfig
from lowrank_lab.llama import Llama
from lowrank_lab.methods import partition
from lowrank_lab.schedule import events, learning_rate
from lowrank_lab.techniques import refactorize_, reset_momentum_

Batch = tuple[Tensor, Tensor]  # tokens and targets, each (sequences, sequence_length)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Mixed precision for `amp-bf16`, nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "amp-bf16")


def gradients(model: Llama, batches: Sequence[Batch], config: RunConfig) -> tuple[Tensor, Tensor]:
    """Fill the gradients from equal pieces of one batch, clipped.

    Returns:
        The mean loss and the global gradient norm before clipping, float32 scalars on the device.
    """
    total: Tensor | None = None
    for tokens, targets in batches:
        with autocast(config, tokens.device):
            loss = model.loss(tokens, targets) / len(batches)
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    limit = config.clip if config.clip > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return total, norm


def update_(
    model: Llama, optimizer: torch.optim.Optimizer, config: RunConfig, step: int
) -> list[dict[str, Any]]:
    """Apply update `step` (from 0), then the events that follow it; gradients are freed.

    Returns:
        What the events did, as they go into metrics.jsonl.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    done: list[dict[str, Any]] = []
    for event in events(step + 1, config):
        if event == "refactor":
            changed, deficient = refactorize_(model)
            done.append({"event": event, "layers": len(changed), "rank_deficient": deficient})
        else:
            targets, _ = partition(model, config.target)
            count = reset_momentum_(optimizer, config.reset_strength, params=targets)
            done.append({"event": event, "strength": config.reset_strength, "parameters": count})
    return done
