"""A run on a source of known entropy nearly reaches it."""

import math

from lowrank_lab import RunConfig
from lowrank_lab.data.prepare import prepare
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.loop import train


def test_a_markov_run_comes_within_two_percent_of_the_known_entropy(tmp_path):
    config = RunConfig(
        model="tiny", corpus="markov", vocab_size=8, steps=400, batch=16, sequence_length=128,
        lr=1e-2, eval_every=400, spectra_every=400, checkpoint_every=400,
    )  # fmt: skip
    result = train(config, tmp_path).result
    assert result["entropy"] == prepare(resolve(config)).entropy
    sampling_error = 4 / math.sqrt(config.test_tokens)  # four times; −log p has a deviation of 1
    assert result["entropy"] - sampling_error < result["test_loss"] < 1.02 * result["entropy"]
