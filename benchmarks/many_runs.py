"""A folder of many run folders, as studies over methods, ranks, rates and seeds leave them.

    .venv/bin/python -m benchmarks.many_runs FOLDER [RUNS]

Nothing is trained: losses and spectra are smooth functions of the configuration.
"""

import functools
import itertools
import json
import math
import os
import sys
from pathlib import Path

from lowrank_lab.config import RunConfig
from lowrank_lab.methods.resolve import resolve

VARIANTS = {  # label -> fields
    "full-rank": {"method": "full-rank"},
    "low-rank": {"method": "low-rank"},
    "low-rank + refactor + reset": {"method": "low-rank", "refactor_every": 20, "reset_every": 20},
    "lora": {"method": "lora"},
    "galore": {"method": "galore"},
    "fira": {"method": "fira"},
    "apollo": {"method": "apollo"},
}
RANKS, RATES, SEEDS = (4, 8, 16), (0.001, 0.003, 0.01), range(9)
LAYERS = [f"model.layers.{i}.{name}" for i in range(2)
          for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]  # fmt: skip
STEPS, EVERY, VALUES = 400, 40, 32
NAMES = ("weights", "gradients", "optimizer_states", "projections", "activations")


def write_many(folder, runs=500, steps=STEPS):
    """Write `runs` folders; the last four are in training, stopped, failed and broken.

    Returns:
        The paths, in that order.
    """
    wanted = list(itertools.islice(_configurations(), runs))
    paths = [_write(Path(folder), *one, steps) for one in wanted]
    training, stopped, failed, broken = paths[-4:]
    for path in (training, stopped, failed):
        (path / "result.json").unlink()
        _cut(path, steps // 2)
    (training / ".lock").write_text(f"{os.getpid()} on {os.uname().nodename}\n")
    os.utime(stopped / "metrics.jsonl", (0, 0))
    (failed / "failed.json").write_text(json.dumps({"key": "", "error": "loss is not finite"}))
    (broken / "config.json").write_text('{"config": {"meth')
    return paths


def grow(path, step):
    """Append a row with an evaluation, as training does."""
    row = _row(json.loads((path / "metrics.jsonl").read_text().splitlines()[-1]), step)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _row(last, step):
    loss = last["loss"] - 0.1
    return last | {"step": step, "tokens_seen": step * 512, "seconds": step / 20, "loss": loss,
                   "validation_loss": loss + 0.01}  # fmt: skip


def _configurations():
    """Label, fields and seed; the seeds of a configuration follow each other."""
    for rank, lr, (label, fields), seed in itertools.product(RANKS, RATES, VARIANTS.items(), SEEDS):
        if label == "full-rank" and rank != RANKS[0]:
            continue
        yield label, fields | {"rank": None if label == "full-rank" else rank, "lr": lr}, seed


_RESOLVED = {}


def _resolved(fields):
    """The configuration as a dict; resolved once for all seeds, which takes milliseconds."""
    key = json.dumps(fields)
    if key not in _RESOLVED:
        config = RunConfig(model="tiny", corpus="markov", steps=STEPS, **fields)
        _RESOLVED[key] = resolve(config).model_dump(mode="json")
    return _RESOLVED[key]


def _write(folder, label, fields, seed, steps):
    name = label.replace(" + ", "-")
    path = folder / f"{name}-r{fields['rank'] or 0}-lr{fields['lr']:g}-s{seed}"
    path.mkdir(parents=True)
    config = _resolved(fields) | {"seed": seed}
    facts = {"label": label, "config": config, "ran_on": {"torch": "2"}}
    (path / "config.json").write_text(json.dumps(facts))
    floor = 2.0 + 0.1 * list(VARIANTS).index(label) - 0.01 * (fields["rank"] or 32)
    floor += 0.05 * abs(math.log10(fields["lr"] / 0.003)) + 0.01 * math.sin(seed)
    rows = [_step(step, floor) for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text(_text(rows))
    spectra = _spectra(list(VARIANTS).index(label), fields["rank"] or VALUES, seed % 3, steps)
    (path / "spectra.jsonl").write_text(spectra)
    share = 1.0 if label == "full-rank" else (fields["rank"] or 0) / 32
    memory = dict(zip(NAMES, (4e6, 4e6 * share, 8e6 * share, 1e5, 3e7), strict=True))
    (path / "memory.json").write_text(json.dumps({k: int(v) for k, v in memory.items()}))
    result = {
        "validation_loss": rows[-1]["validation_loss"], "test_loss": floor,
        "test_perplexity": math.exp(floor), "seconds": steps / 20, "tokens_seen": steps * 512,
        "steps": steps,
        "parameters": 58016, "parameters_without_embeddings": 25248,
        "weight_bytes": int(4e6), "optimizer_state_bytes": int(8e6 * share),
    }  # fmt: skip
    (path / "result.json").write_text(json.dumps(result))
    return path


def _step(step, floor):
    loss = floor + 4 * step**-0.5
    row = {"step": step, "tokens_seen": step * 512, "seconds": step / 20, "lr": 0.01,
           "loss": loss, "grad_norm": 1 / step, "tokens_per_second": 10240.0,
           "peak_memory_bytes": 40_000_000, "events": []}  # fmt: skip
    return row | ({"validation_loss": loss} if step % EVERY == 0 else {})


@functools.cache
def _spectra(variant, rank, seed, steps):
    return _text(
        {"step": step, "layer": layer, "singular_values": [
            (1 + depth / 4 + seed / 100) * (i + 1) ** (-0.5 - (1 - variant / 9) * step / steps)
            for i in range(min(rank, VALUES))
        ]}
        for step in range(0, steps + 1, EVERY) for depth, layer in enumerate(LAYERS)
    )  # fmt: skip


def _cut(path, last):
    for name in ("metrics.jsonl", "spectra.jsonl"):
        rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
        (path / name).write_text(_text(row for row in rows if row["step"] <= last))


def _text(rows):
    return json.dumps(list(rows))[1:-1].replace("}, {", "}\n{") + "\n"


if __name__ == "__main__":
    write_many(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 500)
