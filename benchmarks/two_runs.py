"""Tokens per second in all of `lowrank-lab study` with two runs at a time, one thread each.

The command itself runs: notebooks by papermill, each in a process of its own, then the comparison
and the report. Two processes that train with transformers, before it and after it, are the peer:
they have neither checkpoints nor records. All times here are wall times.
"""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

from benchmarks.harness import Row, contestant_apart
from benchmarks.training import some_tokens
from lowrank_lab.config import RunConfig, Size

WARM_UP = 5  # steps that don't count, of both
Shape = tuple[int, int]  # sequences in a batch, tokens in a sequence
Builder = Callable[..., Callable[..., object]]  # of a training step


def two_runs(
    name: str, size: Size, shape: Shape, steps: int, floor: float, their_step: Builder
) -> Row:
    """Tokens per second of both runs together, while they train; start-up is in the note.

    Args:
        floor: seconds that the products of a step take.
        their_step: builds the peer's step from size, precision and way.
    """
    with TemporaryDirectory() as folder:
        peers = [both_loops(size, shape, steps, their_step)]
        ours, seconds = study(Path(folder), size, shape, steps)
        peers.append(both_loops(size, shape, steps, their_step))
    peer, tokens = sum(peers) / len(peers), shape[0] * shape[1]
    whole = 2 * steps * tokens / seconds
    return Row(
        f"lowrank-lab study, two runs of {name} at a time, full-rank, fp32", ours, peer,
        2 * tokens / floor, "tokens/s", ours / peer, "≥ 1.6",
        "transformers, eager + AdamW(fused), two processes",
        f"tokens per second of both together, wall time, without start-up; the whole command, with "
        f"start-up, tokenizer, comparison and report, took {seconds:.0f} s for 2 × {steps} steps: "
        f"{whole:,.0f} tokens/s; floor: products at their measured rates, attention at that of "
        "large products",
    )  # fmt: skip


def study(folder: Path, size: Size, shape: Shape, steps: int) -> tuple[float, float]:
    """Tokens per second of both runs after their first steps, and seconds of the whole command."""
    text, plan, out = folder / "corpus.txt", folder / "pair.yaml", folder / "out"
    text.write_text(some_text())
    run = {
        "model": "tiny", **size._asdict(), "corpus": f"text:{text}", "method": "full-rank",
        "batch": shape[0], "sequence_length": shape[1], "steps": steps, "lr": 1e-3,
    }  # fmt: skip
    RunConfig(**run)
    plan.write_text(yaml.safe_dump({"base": run, "variants": {"full-rank": {}}, "seeds": [0, 1]}))
    command = [sys.executable, "-m", "lowrank_lab", "study", str(plan), "--out", str(out)]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--jobs", "2"], check=True, capture_output=True,
        env=os.environ | {"LOWRANK_LAB_DATA": str(folder)},
    )  # fmt: skip
    seconds = time.perf_counter() - started
    rates = [rate(file) for file in out.glob("*/metrics.jsonl")]
    assert len(rates) == 2
    return sum(rates), seconds


def rate(metrics: Path) -> float:
    """Tokens per second of a run after its first steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    first, last = rows[min(WARM_UP, len(rows) - 2)], rows[-1]
    tokens: float = last["tokens_seen"] - first["tokens_seen"]
    return tokens / (last["seconds"] - first["seconds"])


def some_text() -> str:
    """1.5 MB of words, drawn at random from 400."""
    chance = random.Random(0)
    letters = string.ascii_lowercase
    words = ["".join(chance.choices(letters, k=chance.randint(2, 8))) for _ in range(400)]
    return "\n".join(" ".join(chance.choices(words, k=12)) for _ in range(20_000))


def both_loops(size: Size, shape: Shape, steps: int, their_step: Builder) -> float:
    """Tokens per second in all of two processes that train at the same time."""
    with ExitStack() as stack:
        loops = [
            stack.enter_context(contestant_apart(loop, size, shape, their_step)) for _ in range(2)
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda call: call(WARM_UP), loops))
            seconds = list(pool.map(lambda call: call(steps), loops))
    return sum(steps * shape[0] * shape[1] / s for s in seconds)


def loop(size: Size, shape: Shape, their_step: Builder) -> Callable[[int], float]:
    """Training with one thread in this process: takes some steps and returns their seconds."""
    torch.set_num_threads(1)
    step = their_step(size, "fp32", "eager")

    def train(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            step(*some_tokens(size, shape))
        return time.perf_counter() - started

    return train
