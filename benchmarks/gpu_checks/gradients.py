"""Loss and gradients of each layer kind against plain float64 autograd of the full logits.

Compiled cases cost tens of seconds each on a card. These are compiled: dense and SLTrain under
autocast, low-rank in bf16, and LoRA in fp32, one block each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_checks.results import at_most
from benchmarks.gpu_checks.session import Item, Session, relative_error
from lowrank_lab.config import ResolvedConfig, RunConfig
from lowrank_lab.device import cuda_path
from lowrank_lab.methods.build import build, build_model
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.gradients import PerLayerUpdates, autocast
from lowrank_lab.training.step import take_step_

KINDS = {
    "dense": "full-rank", "low-rank": "low-rank", "lora": "lora", "cola": "cola",
    "sltrain": "sltrain",
}  # fmt: skip
PRECISIONS = ("fp32", "bf16", "amp-bf16")
COMPILED = {
    "dense": "amp-bf16", "sltrain": "amp-bf16", "low-rank": "bf16", "lora": "fp32",
    "cola": "amp-bf16",
}  # fmt: skip
LIMIT = {"fp32": 1e-5, "bf16": 3e-2, "amp-bf16": 3e-2}
SHAPE = (4, 64)
Case = tuple[str, str, str, dict[str, Any]]  # kind, precision, how, and fields of RunConfig
Answer = dict[str, Tensor]  # the loss and the gradients, by name


def items(session: Session) -> Iterator[Item]:
    """Eager cases first, then those that take long."""
    cases: list[Case] = [
        (kind, precision, "eager", {}) for kind, precision in product(KINDS, PRECISIONS)
    ]
    again = {"activation_checkpointing": True}
    cases += [
        (kind, precision, "checkpointing", again)
        for kind, precision in product(("dense", "sltrain"), ("fp32", "amp-bf16"))
    ]
    large = {"vocab_size": 32_000}
    cases += [
        ("dense", precision, "32,000 entries", large)
        for precision in (() if session.tiny else PRECISIONS)
    ]
    compiled = {"compile": True, "num_layers": 1}
    late = [(kind, precision, "compiled", compiled) for kind, precision in COMPILED.items()]
    for kind, precision, how, fields in cases:
        what = f"{kind}, {precision}, {how}"
        yield what, partial(against_float64, session, what, kind, precision, fields)
    for kind in ("dense", "low-rank"):
        yield f"{kind}, per layer", partial(per_layer, session, kind)
    for kind, precision, how, fields in late[: 1 if session.tiny else None]:
        what = f"{kind}, {precision}, {how}"
        yield what, partial(against_float64, session, what, kind, precision, fields)


def configuration(
    session: Session, kind: str, precision: str, fields: dict[str, Any]
) -> ResolvedConfig:
    """A small model. Low-rank layers start spectral: from Kaiming's start, bf16 in plain autograd
    is beyond the limit as well.
    """
    fields = {"init": "spectral"} | fields if kind == "low-rank" else fields
    small = {"model": "tiny", "num_layers": 2} if session.tiny else {"model": "micro"}
    sizes = {"vocab_size": 1000, "batch": SHAPE[0], "sequence_length": SHAPE[1], "clip": 0.0}
    return resolve(
        RunConfig(method=KINDS[kind], precision=precision, **{**small, **sizes, **fields})
    )


def against_float64(
    session: Session, what: str, kind: str, precision: str, fields: dict[str, Any]
) -> None:
    """The errors of the loss and of all gradients together.

    A single weight may be near its gradient's rounding; in fp32 the worst weight is checked too.
    """
    config = configuration(session, kind, precision, fields)
    model = build_model(config)
    stir_(model)
    tokens, targets = session.tokens(config.size.vocab_size, SHAPE)
    expected = in_float64(config, model, tokens.cpu(), targets.cpu())
    model.to(session.device).train()
    with cuda_path():
        model.pack_(aligned=config.precision != "fp32")
    if config.compile:
        model.compile_blocks()
    with cuda_path():
        with autocast(config, session.device):
            loss = model.loss(tokens, targets)
        torch.autograd.backward(loss)
    found = answer_of(model, loss)
    limit = at_most(LIMIT[precision])
    names = [name for name in expected if name != "loss"]
    total = relative_error(*(torch.cat([a[n].flatten() for n in names]) for a in (found, expected)))
    report = session.results.fact
    of_loss = relative_error(found["loss"], expected["loss"])
    report(f"{what}: loss", of_loss, "relative error", limit)
    report(f"{what}: gradients", total, "relative error", limit)
    errors = {name: relative_error(found[name], expected[name]) for name in names}
    worst = max(errors, key=errors.__getitem__)
    report(
        f"{what}: worst gradient", errors[worst], "relative error",
        limit if precision == "fp32" else None, worst=worst,
    )  # fmt: skip


def stir_(model: torch.nn.Module) -> None:
    """Random values in place of the zeros that factors start from, so that all have gradients."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))


def in_float64(config: ResolvedConfig, model: Any, tokens: Tensor, targets: Tensor) -> Answer:
    """The answer on the CPU from the model's own weights, with full logits and no autocast."""
    twin = build_model(config.override(compile=False, activation_checkpointing=False)).double()
    twin.load_state_dict({k: v.double() if v.is_floating_point() else v
                          for k, v in model.state_dict().items()})  # fmt: skip
    logits = twin.lm_head(twin.hidden_states(tokens))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.autograd.backward(loss)
    return answer_of(twin, loss)


def answer_of(model: Any, loss: Tensor) -> Answer:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double().cpu()} | {n: g.double().cpu() for n, g in grads.items()}


def per_layer(session: Session, kind: str) -> None:
    """Two steps that update within the backward pass, against two that update after it."""
    config = configuration(session, kind, "fp32", {})
    weights = []
    for within in (False, True):
        chosen = resolve(config.replace(per_layer=within))
        model, optimizer = build(chosen)
        model.to(session.device).train()
        updates = PerLayerUpdates(model, optimizer) if within else None
        for step in range(2):
            batch = session.tokens(chosen.size.vocab_size, SHAPE, seed=step)
            with cuda_path():
                take_step_(model, optimizer, [batch], chosen, step, per_layer=updates)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    session.results.fact(
        f"{kind}, per layer: weights", relative_error(weights[1], weights[0]), "relative error",
        at_most(1e-5),
    )  # fmt: skip
