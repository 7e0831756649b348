"""Growth of step time and memory with model size, rank and tokens."""

from __future__ import annotations

import torch

from benchmarks.harness import Row, gemm_rate, median, peak_bytes, take_turns
from lowrank_lab.config import SIZES, RunConfig
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.gradients import gradients
from lowrank_lab.training.loop import fast_process
from lowrank_lab.training.step import update_

METHODS = ("full-rank", "galore", "fira", "low-rank")


def rows(quick: bool = False) -> list[Row]:
    """One row per point, without targets; `ratio` is measured time over that of its FLOPs.

    Names are `growth MODEL METHOD rRANK tTOKENS`; the note has the peak memory in MiB.
    """
    sizes = ("tiny",) if quick else ("9m", "20m", "35m", "60m", "130m")
    with fast_process():
        tokens, rate = 256 if quick else 512, gemm_rate(torch.float32, quick)
        found = [step(size, method, None, tokens, rate) for size in sizes for method in METHODS]
        if not quick:
            found += [step("9m", m, r, tokens, rate) for m in METHODS[1:] for r in (8, 16, 32, 128)]
            found += [step("9m", m, None, t, rate) for m in METHODS for t in (256, 1024, 2048)]
    return found


def step(size: str, method: str, rank: int | None, tokens: int, rate: float) -> Row:
    """Median time and peak memory of one whole training step in float32; rate is in FLOP/s."""
    length = min(tokens, 256)
    config = RunConfig(
        model=size, method=method, rank=rank, steps=100, batch=tokens // length,
        sequence_length=length, corpus="markov", vocab_size=SIZES[size].vocab_size,
    )  # fmt: skip
    config = resolve(config)
    model, optimizer = build(config)
    torch.manual_seed(0)
    text = torch.randint(0, 64, (config.batch, length + 1))
    batches = [(text[:, :-1], text[:, 1:])]
    count = 0

    def whole() -> None:
        nonlocal count
        gradients(model, batches, config)
        update_(model, optimizer, config, count)
        count += 1

    whole()  # the first step creates states and projections
    seconds = median(take_turns({"ours": whole}, 3)["ours"])
    peak = peak_bytes(whole)
    parameters = sum(p.numel() for p in model.parameters())
    floor = 6 * parameters * tokens / rate
    return Row(
        f"growth {size} {method} r{rank or config.size.hidden_size // 4} t{tokens}",
        seconds, None, floor, "s", seconds / floor, "", "6·N·tokens at the rate of GEMMs",
        f"peak {peak / 2**20:.0f} MiB; {parameters} parameters",
    )  # fmt: skip
