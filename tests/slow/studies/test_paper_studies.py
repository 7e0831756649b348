"""What the heads of the paper's study files say is what simulations say, and runs of 60m train."""

import math
import re

import pytest
from paper_studies import (
    COLUMNS,
    PUBLISHED,
    ROW,
    agrees,
    assert_head_says,
    facts_of,
    head_of,
    path_of,
)

from lowrank_lab.planning import resources
from lowrank_lab.studies.study_file import load_study
from lowrank_lab.training.loop import train


def test_a_head_says_what_steps_on_fake_tensors_take():
    facts = facts_of("60m")
    assert {run["memory_by"] for run in facts["runs"]} == {"simulated"}
    assert_head_says("60m", facts, COLUMNS)


@pytest.mark.parametrize("size", [size for size in PUBLISHED if size != "60m"])
def test_a_larger_head_says_so_of_a_dense_and_of_a_factorised_run(size):
    """Of two runs: all thirteen of each size take minutes, by the same code."""
    shown = {label: values for label, *values in re.findall(f"^{ROW}$", head_of(size), re.M)}
    configs = dict(load_study(path_of(size), corpora=False).runs.values())
    for label in ("full-rank", "low-rank + refactor + reset"):
        need = resources.resources_of(configs[label], cuda=True)
        assert need.source == "simulated"
        assert agrees(shown[label][1], need.device / 1e9)


@pytest.mark.parametrize("label", ["galore", "low-rank + refactor + reset"])
def test_a_run_of_60m_trains(label, c4_names, tmp_path):
    runs = load_study(path_of("60m"), corpora=False).runs.values()
    (config,) = [config for name, config in runs if name == label]
    short = {"refactor_every": 1, "reset_every": 2, "recovery_steps": 2}
    config = config.replace(
        **c4_names, vocab_size=None, batch=2, steps=3, eval_every=3, spectra_every=3,
        checkpoint_every=3, eval_tokens=512, test_tokens=512, spectra_layers="0.self_attn.q_proj",
        **(short if config.refactor_every else {}),
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    assert run.finished
    assert run.config.size[:4] == (512, 1376, 8, 8)
    losses = list(run.metrics["loss"])
    assert losses[0] == pytest.approx(math.log(257), abs=0.5)
    assert losses[2] < losses[0] - 1
