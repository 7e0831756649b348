"""`python tests/write_golden.py [METHOD…]` writes the losses that tests/golden/ holds.

After adding a method, or a change that is meant to move the losses; without names, all files.
"""

import sys

import torch
from paths import GOLDEN
from short import QUICK, short_options, usual_rate

from lowrank_lab.config import RunConfig
from lowrank_lab.methods.build import build
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.gradients import gradients
from lowrank_lab.training.step import update_

STEPS = 20
TECHNIQUES = {"refactor_every": 5, "reset_every": 5, "recovery_steps": 3}
# Options that decide golden losses, instead of defaults that tuning may change; β₂ is 0.999.
OPTIONS = {
    "galore": {"scale": 0.25}, "golore": {"scale": 0.25}, "fira": {"alpha": 1.0},
    "apollo": {"scale": 1.0}, "apollo-mini": {"scale": 128.0},
    "lora": {"alpha": 32}, "relora": {"alpha": 32}, "sltrain": {"alpha": 32},
    "low-rank": {"alpha": 32}, "loro": {"alpha": 32}, "ldadam": {"beta2": 0.99, "rho": 0.908},
    "muon": {"momentum": 0.95}, "normuon": {"ns_precision": "fp32", "momentum": 0.95},
    "spectron": {"ns_precision": "fp32"},
}  # fmt: skip


def tiny(method="full-rank", **values):
    """A run that takes a second."""
    return RunConfig(**{"model": "tiny", "steps": STEPS, "method": method, **values})


def golden_configs():
    """File name → configuration, each small enough to run often, each with a second projection."""
    short = {"batch": 8, "sequence_length": 32}
    configs = {}
    for name in QUICK:
        options = {"beta2": 0.999} if "beta2" in METHODS[name].options else {}
        options |= short_options(name, 9) | OPTIONS.get(name, {})
        configs[name] = tiny(name, lr=usual_rate(name), method_options=options, **short)
    configs["low-rank-refactor-reset"] = configs["low-rank"].replace(**TECHNIQUES)
    return configs


def losses_of(config):
    """Losses of 20 steps on a stream in which each token mostly follows from the one before."""
    config = resolve(config)
    model, optimizer = build(config)
    generator = torch.Generator().manual_seed(11)
    losses = []
    for step in range(STEPS):
        tokens = torch.randint(40, (8, 33), generator=generator)
        follows = torch.rand(8, 32, generator=generator) < 0.8
        for i in range(32):
            following = (tokens[:, i] * 7 + 3) % 40
            tokens[:, i + 1] = torch.where(follows[:, i], following, tokens[:, i + 1])
        loss, _ = gradients(model, [(tokens[:, :-1], tokens[:, 1:])], config)
        update_(model, optimizer, config, step)
        losses.append(loss.item())
    return losses


def write_golden(names):
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    configs = golden_configs()
    for name in names or configs:
        text = "".join(f"{loss:.6f}\n" for loss in losses_of(configs[name]))
        (GOLDEN / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    write_golden(sys.argv[1:])
