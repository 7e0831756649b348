"""Peaks that the chapter on the study and the README print are those of the simulation."""

from paths import ROOT

import lowrank_lab as lab
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.planning.fit import LONG


def test_peaks_at_1b_are_those_of_the_simulation():
    peaks = {}
    for method in ("low-rank", "galore", "full-rank"):
        rank = {"rank": 512} if METHODS[method].uses_rank else {}
        config = RunConfig(
            model="1b", method=method, precision="bf16", batch=16, steps=LONG,
            vocab_size=32_000, corpus="markov", **rank,
        )  # fmt: skip
        peaks[method] = lab.simulate_memory(config, "cuda").steps["next"].peak.total / 1e9
    page = " ".join((ROOT / "docs" / "explanation" / "study.md").read_text().split())
    ratio = peaks["low-rank"] / peaks["full-rank"]
    assert f"with 16 × 256 tokens, it is {ratio:.2f} times" in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    shown_peaks = "a step on CUDA peaks at {low-rank:.1f}, {galore:.1f} and {full-rank:.1f} GB"
    assert shown_peaks.format(**peaks) in readme
