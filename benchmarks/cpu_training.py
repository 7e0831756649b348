"""Training on a CPU in float32 and bf16 against transformers, eager and compiled, and a study.

Both take the same steps as in `training`, with a fused AdamW; the peer is compiled whole by
torch.compile, ours per block. Each trains in a process of its own. With one thread, a process's
own CPU time is what counts: on a quiet machine it is the wall time, on a busy one it still is what
the arithmetic takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import (
    Row,
    bf16_is_native,
    contestant_apart,
    median,
    ratio,
    take_turns,
    threads,
)
from benchmarks.training import BATCH, LENGTH, LR, pair, some_tokens, their_loss
from benchmarks.two_runs import two_runs
from lowrank_lab.config import SIZES, RunConfig, Size
from lowrank_lab.training.gradients import gradients
from lowrank_lab.training.loop import fast_process
from lowrank_lab.training.step import update_

MICRO = SIZES["micro"]._replace(vocab_size=512)  # the studies' model
MODELS = {"micro": (MICRO, 1), "1M": (SIZES["mini"], 2), "5M": (Size(256, 688, 4, 4, 4096), 2)}
TARGETS = {"eager": "≥ 1.6", "compiled": "≥ 1.4"}
UNTIL_THE_END = ExitStack()  # contexts that end with the process
Shape = tuple[int, int]  # sequences in a batch, tokens in a sequence


def rows(quick: bool = False) -> list[Row]:
    """Speed of each model, precision and way; then of a study with two runs at a time.

    With `quick`, of a tiny model, eager.
    """
    models = {"tiny": (SIZES["tiny"], 1)} if quick else MODELS
    shape = (2, 32) if quick else (BATCH, LENGTH)
    precisions = ["fp32", *(["amp-bf16"] if bf16_is_native() and not quick else [])]
    found = []
    for name, (size, count) in models.items():
        for precision in precisions:
            for how in TARGETS:
                if (how == "eager" and precision != "fp32") or (how == "compiled" and quick):
                    continue
                found.append(speed(name, size, count, precision, how, shape, rounds(name, quick)))
    if quick:
        return found
    name, (size, _) = next(iter(models.items()))
    return [*found, two_runs(name, size, shape, 150, floor_seconds(size, shape, 1), their_step)]


def rounds(name: str, quick: bool) -> int:
    return 2 if quick else 15 if name == "micro" else 9


def speed(
    name: str, size: Size, count: int, precision: str, how: str, shape: Shape, times: int
) -> Row:
    """Tokens per second of ours and of the peer, taking turns."""
    with (
        contestant_apart(stepper, "ours", size, count, precision, how, shape) as ours,
        contestant_apart(stepper, "peer", size, count, precision, how, shape) as peer,
    ):
        mine, others = turns(ours, peer, size, shape, times)
    tokens = shape[0] * shape[1]
    floor = floor_seconds(size, shape, count, precision)
    return Row(
        f"training, {name}, {precision}, {how}, {count} thread{'s' * (count > 1)}",
        tokens / median(mine), tokens / median(others), tokens / floor,
        "tokens/s", ratio(others, mine), TARGETS[how], f"transformers, {how} + AdamW(fused)",
        f"{tokens} tokens per step; {'CPU' if count == 1 else 'wall'} time",
    )  # fmt: skip


def turns(
    ours: Callable[..., float], peer: Callable[..., float], size: Size, shape: Shape, times: int
) -> tuple[list[float], list[float]]:
    """The seconds that the two measured themselves, round by round."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}

    def step(who: str, call: Callable[..., float]) -> None:
        seconds[who].append(call(*some_tokens(size, shape)))

    take_turns(
        {"ours": partial(step, "ours", ours), "peer": partial(step, "peer", peer)},
        times,
        warm_up=3,
    )
    return seconds["ours"][3:], seconds["peer"][3:]


def stepper(
    who: str, size: Size, count: int, precision: str, how: str, shape: Shape
) -> Callable[[Tensor, Tensor], float]:
    """A step in this process, which returns its seconds."""
    torch.set_num_threads(count)
    take = (
        our_step(size, precision, how, shape) if who == "ours" else their_step(size, precision, how)
    )
    clock = clock_of(count)

    def step(tokens: Tensor, targets: Tensor) -> float:
        started = clock()
        take(tokens, targets)
        return clock() - started

    return step


def our_step(
    size: Size, precision: str, how: str, shape: Shape
) -> Callable[[Tensor, Tensor], None]:
    UNTIL_THE_END.enter_context(fast_process())
    model, _ = pair(size)
    config = RunConfig(batch=shape[0], sequence_length=shape[1], precision=precision, lr=LR)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    if how == "compiled":
        model.compile_blocks()

    def step(tokens: Tensor, targets: Tensor) -> None:
        loss, norm = gradients(model, [(tokens, targets)], config)
        torch.stack([loss, norm]).tolist()
        update_(model, optimizer, config, 0)

    return step


def their_step(size: Size, precision: str, how: str) -> Callable[[Tensor, Tensor], None]:
    _, model = pair(size)
    called = torch.compile(model) if how == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            loss = their_loss(called, tokens, targets)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.stack([loss.detach(), norm]).tolist()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_seconds(size: Size, shape: Shape, count: int, precision: str = "fp32") -> float:
    """Seconds per step of the products, each at its measured rate, and of causal attention."""
    tokens, length, blocks = shape[0] * shape[1], shape[1], size.num_layers
    d, hidden = size.hidden_size, size.intermediate_size
    weights = [*4 * blocks * [(d, d)], *2 * blocks * [(d, hidden)], *blocks * [(hidden, d)]]
    weights.append((d, size.vocab_size))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with threads(count), fast_process():
        seconds = {
            kind: sum(_fastest(*p, count) for p in products_of(tokens, *kind, dtype))
            for kind in {*weights}
        }
        large = torch.randn(1024, 1024).to(dtype)
        rate = 2 * 1024**3 / _fastest(large, large, count)
    # 2 products forward and 5 backward, half of each
    return sum(seconds[kind] for kind in weights) + blocks * 7 * tokens * length * d / rate


def products_of(tokens: int, k: int, n: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The three products of a layer: x Wᵀ, dY W and dYᵀ x."""
    x, dY, W = (torch.randn(shape).to(dtype) for shape in ((tokens, k), (tokens, n), (n, k)))
    yield from ((x, W.T), (dY, W), (dY.T, x))


def _fastest(a: Tensor, b: Tensor, count: int) -> float:
    """The least seconds of a · b in 12 calls."""
    clock, least = clock_of(count), float("inf")
    for _ in range(12):
        started = clock()
        torch.mm(a, b)
        least = min(least, clock() - started)
    return least


def clock_of(count: int) -> Callable[[], float]:
    """The clock for a number of threads."""
    return time.process_time if count == 1 else time.perf_counter
