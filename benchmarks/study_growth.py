"""Growth with the number of runs in a study: load_runs, final_table and the whole report.

The runs are synthetic, but their folders hold real files, as a run of the `micro` model writes
them: 200 rows of metrics, ten of them with an evaluation, and six records of 21 layers' spectra.
Ten seeds share a label, so that 1000 runs have 100 labels and 4950 pairs of labels to compare.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, median, take_turns, threads
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.report import write_report
from lowrank_lab.runs.files import append_jsonl
from lowrank_lab.runs.run import final_table, load_runs

COUNTS = (10, 100, 1000)
LIMIT = 5.0  # seconds for 1000 runs
SEEDS = 10  # runs of a label
STEPS, EVERY = 2000, 10  # a row every ten steps
METHODS = ("full-rank", "low-rank", "galore", "fira")
LAYERS = [
    f"model.layers.{i}.{name}"
    for i in range(3)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


def rows(quick: bool = False) -> list[Row]:
    """Seconds of load_runs + final_table + write_report, one row per number of runs."""
    found = []
    for count in (5,) if quick else COUNTS:
        seconds = growth(count, rounds=1 if quick or count >= 1000 else 3)
        total = seconds["load_runs"] + seconds["write_report"]
        note = "; ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        found.append(
            Row(
                f"study of {count} runs: table and report", total, None, seconds["json"], "s",
                total, f"≤ {LIMIT:g}" if count == max(COUNTS) else "", note=f"1 thread; {note}",
            )
        )  # fmt: skip
    return found


def growth(count: int, rounds: int = 3) -> dict[str, float]:
    """Median seconds for a study of `count` runs.

    Returns:
        load_runs (with final_table), write_report (with its figures), and, as the floor, json:
        the metrics of every run read and parsed once, and nothing made of them.
    """
    with tempfile.TemporaryDirectory() as place, threads(1):
        folder = Path(place) / "runs"
        write_study(folder, count)
        seconds = take_turns(
            {
                "load_runs": lambda: final_table(load_runs(folder)),
                "write_report": lambda: write_report(folder, out=Path(place) / "report"),
                "json": lambda: parse_metrics(folder),
            },
            rounds,
        )
    return {name: median(values) for name, values in seconds.items()}


def parse_metrics(folder: Path) -> None:
    for path in folder.glob("*/metrics.jsonl"):
        with path.open() as file:
            for line in file:
                json.loads(line)


def write_study(folder: Path, count: int) -> None:
    """Write `count` finished run folders: SEEDS seeds of each method and rank."""
    for index in range(count):
        variant, seed = divmod(index, SEEDS)
        method, rank = METHODS[variant % len(METHODS)], 4 + variant // len(METHODS)
        label = f"{method} {rank}"
        config = resolve(
            RunConfig(
                model="micro", corpus="python", num_layers=3, steps=STEPS, seed=seed, method=method,
                rank=None if method == "full-rank" else rank,
            )
        )  # fmt: skip
        chance = np.random.default_rng(index)
        write_run(folder / f"{config.run_id}-{index}", label, config, chance, 3 + 1 / rank)


def write_run(
    folder: Path, label: str, config: RunConfig, chance: np.random.Generator, ending: float
) -> None:
    """A finished run folder whose loss falls from 6 to about `ending`; without trained weights."""
    folder.mkdir(parents=True)
    ran_on = {"training_source": "0" * 64, "corpus_sha256": "0" * 64, "torch": "2", "threads": 1}
    facts = {"label": label, "config": config.model_dump(), "ran_on": ran_on}
    _write_json(folder / "config.json", facts)
    sizes = {"weight_bytes": 500480, "optimizer_state_bytes": 1000964 + 4096 * (config.rank or 64)}
    metrics = [_metrics_row(step, chance, ending, sizes) for step in range(EVERY, STEPS + 1, EVERY)]
    append_jsonl(folder / "metrics.jsonl", metrics)
    spectra = [
        {"step": step, "layer": layer, "singular_values": _falling(chance, config.rank or 64)}
        for step in range(0, STEPS + 1, STEPS // 5)
        for layer in LAYERS
    ]
    append_jsonl(folder / "spectra.jsonl", spectra)
    memory = {
        "weights": sizes["weight_bytes"], "gradients": sizes["weight_bytes"],
        "optimizer_states": sizes["optimizer_state_bytes"], "projections": 0,
        "activations": 33972224,
    }  # fmt: skip
    _write_json(folder / "memory.json", memory)
    loss = metrics[-1]["validation_loss"]
    result = {
        "validation_loss": loss, "test_loss": loss, "validation_perplexity": float(np.exp(loss)),
        "test_perplexity": float(np.exp(loss)), "entropy": None, "steps": STEPS,
        "tokens_seen": metrics[-1]["tokens_seen"], "seconds": metrics[-1]["seconds"],
        "parameters": 125120, "parameters_without_embeddings": 59584, **sizes,
    }  # fmt: skip
    _write_json(folder / "result.json", result)


def _metrics_row(
    step: int, chance: np.random.Generator, ending: float, sizes: dict[str, int]
) -> dict[str, Any]:
    loss = ending + (6 - ending) * float(np.exp(-step / 200)) + 0.01 * float(chance.normal())
    row = {
        "step": step, "tokens_seen": 2048 * step, "seconds": round(step / 20, 4), "loss": loss,
        "lr": 0.005 * float(np.cos(step / STEPS)), "grad_norm": float(chance.gamma(4.0, 0.2)),
        "tokens_per_second": round(4e4 + 1e3 * float(chance.normal()), 1), **sizes,
        "gradient_bytes": sizes["weight_bytes"], "peak_memory_bytes": None,
        "events": [] if step % 200 else [{"event": "reset", "strength": 1.0, "parameters": 42}],
    }  # fmt: skip
    return row | ({} if step % 200 else {"validation_loss": loss + 0.01 * float(chance.normal())})


def _write_json(path: Path, value: object) -> None:
    """As runs.write_json, without waiting for the disk three thousand times."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def _falling(chance: np.random.Generator, rank: int) -> list[float]:
    values: list[float] = np.sort(chance.gamma(2.0, 0.1, rank))[::-1].tolist()
    return values
