"""Knobs that only rename the learning rate of the targets: a study need not tune them beside it."""

import pytest

from lowrank_lab import RunConfig, train

BASE = {
    "model": "tiny", "corpus": "markov", "steps": 6, "batch": 4, "rest_lr": 2e-3, "clip": 0,
    "schedule": "constant", "warmup": 0,
}  # fmt: skip
# A method and its fields; the same with another value of the knob; the two learning rates.
CASES = {
    "galore, scale": ({"scale": 1.0, "update_proj_gap": 2}, {"scale": 0.25}, (1e-2, 4e-2)),
    "apollo, scale": ({"scale": 1.0, "update_proj_gap": 2}, {"scale": 4.0}, (1e-2, 5e-3)),
    "low-rank, alpha": ({"alpha": 4.0, "eps": 1e-30}, {"alpha": 16.0}, (1e-2, 5e-3)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_scale_and_a_rate_that_make_the_same_step_train_the_same(case, tmp_path):
    options, other, rates = CASES[case]
    method = case.split(",")[0]
    init = {"init": "spectral"} if method == "low-rank" else {}
    losses = []
    for lr, changed in zip(rates, ({}, other), strict=True):
        config = RunConfig(
            method=method, lr=lr, rank=4, method_options=options | changed, **BASE, **init
        )
        run = train(config, tmp_path / str(lr))
        losses.append(run.metrics["loss"].tolist())
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)  # it learned
