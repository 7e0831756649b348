"""Kernels of an optimizer step on CUDA, counted without a card, reads, and the page on GPUs."""

import re

import pytest
import torch
from paths import ROOT

from benchmarks.graph_kernels import GRAPH
from benchmarks.kernels import OPTIMIZERS, loss_kernels, step_kernels
from lowrank_lab.config import SIZES
from lowrank_lab.methods.registry import METHODS

LIMITS = {"60m": 40, "350m": 80}
# Newton and Schulz takes 5 · (1 + 2s) products for s pairs of sides, and 1 + 3s kernels for
# copies and norms: 32 at 60m. At 350m, whose matrices fill two batches with s = 1, twice 19.
# NorMuon: these; 4 a batch for averages and weights; 17 to 19 for norms of rows and matrices.
# Spectron: 32 (its factors have two pairs of sides, and one batch); power iteration, 9 products and
# copies in float32 and 8 of vectors; 5 for the bounds; 3 for transposed copies and weights.
# LDAdam: 9 products for each shape; an orthonormal basis of all projections, 17 a batch with
# CholeskyQR3; 21 a batch for copies, and chains on all moments.
MORE = {
    "normuon": {"60m": 59, "350m": 81},
    "spectron": {"60m": 61, "350m": 61},
    "ldadam": {"60m": 66, "350m": 103},
}
# with compiled chains, at 60m
COMPILED = {
    "fira": 25, "apollo": 20, "apollo-mini": 17, "spam": 4, "stable-spam": 18, "scale": 31,
    "normuon": 49,
}  # fmt: skip
PAGE = (ROOT / "docs" / "how-to" / "gpus.md").read_text()
ROWS = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.M)
TEXT = " ".join(PAGE.split())
OTHERS = {"AdamW, full rank or on factors": "full-rank"}


@pytest.mark.parametrize("size", LIMITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_nothing_due_launches_few_kernels_and_reads_no_value(name, size):
    """The update and the check that can turn it off; of norm and clipping there are always few."""
    method, options = OPTIMIZERS[name]
    counts = step_kernels(method, size, options)
    limits = MORE.get(name, LIMITS)
    assert 0 < counts.check.total + counts.update.total <= limits[size], counts.update.kernels
    assert counts.norm.total < 10
    assert not any(count.waits for count in counts)


@pytest.mark.parametrize("size", LIMITS)
@pytest.mark.parametrize("method", ["galore", "golore"])
def test_averages_in_float32_take_as_few_kernels(method, size):
    counts = step_kernels(method, size, {}, state_precision="fp32")
    assert counts.check.total + counts.update.total <= LIMITS[size], counts.update.kernels


@pytest.mark.parametrize("size", LIMITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_float32_weights_launches_few_kernels(name, size):
    """Mixed precision: Newton and Schulz iterate in bfloat16, which takes two to five casts."""
    method, options = OPTIMIZERS[name]
    counts = step_kernels(method, size, options, precision="amp-bf16")
    casts = {"muon": 5, "normuon": 5, "spectron": 2}.get(name, 0)
    limit = MORE.get(name, LIMITS)[size] + casts
    assert 0 < counts.check.total + counts.update.total <= limit, counts.update.kernels


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_chains_leave_fewer_kernels(name):
    """Counted by inductor's scheduler: what it fuses is one kernel."""
    plain, found = (step_kernels(name, "60m", {}, compiled=c).update for c in (False, True))
    assert found.kernels[GRAPH] > 0
    assert found.total == COMPILED[name] < plain.total, found.kernels
    assert found.waits == 0


@pytest.mark.parametrize("name", ["galore", "fira", "stable-spam", "muon", "loro"])
def test_weight_decay_adds_a_kernel_for_each_group(name):
    method, options = OPTIMIZERS[name]
    plain, decayed = (
        step_kernels(method, "60m", options, weight_decay=decay).update.total for decay in (0, 0.1)
    )
    assert decayed <= plain + 2


@pytest.mark.parametrize("method", ["galore", "fira", "apollo"])
def test_moments_in_8_bits_of_all_matrices_are_coded_together(method):
    pytest.importorskip("torchao")
    together, one_by_one = (
        step_kernels(method, "60m", {}, stacked=stacked, state_precision="8bit").update
        for stacked in (True, False)
    )
    assert together.total < one_by_one.total / 6
    assert together.kernels["bucketize"] <= 12
    assert together.waits == 0


def method_of(row):
    name = row.partition(", ")[0]
    return OTHERS.get(row) or next(m for m in METHODS if m.lower() == name.lower())


def test_the_table_has_most_methods():
    assert len(ROWS) > 12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_the_counts_of_today(row):
    method = method_of(row[0])
    found = [step_kernels(method, size, {}).update.total for size in ("60m", "350m")]
    assert [int(row[1]), int(row[3])] == found


def test_the_compiled_counts_at_60m_are_those_that_the_counting_test_holds():
    found = {method_of(row[0]): int(row[2]) for row in ROWS if row[2] != row[1]}
    assert found == {name: count for name, count in COMPILED.items() if name in found}
    assert len(found) == len(COMPILED)


def counts_of(method, size, **fields):
    return f"{step_kernels(method, size, {}, **fields).update.total:,}"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"state_precision": "fp32"}, "takes {} at 60m and {} at 350m"),
        ({"stochastic_rounding": True}, "as one process: {} and {} kernels"),
    ],
    ids=str,
)
def test_the_text_has_the_counts_of_galore_with_options(fields, sentence):
    counts = (counts_of("galore", size, **fields) for size in ("60m", "350m"))
    assert sentence.format(*counts) in TEXT


@pytest.mark.parametrize("name", ["Fira", "Muon", "Stable-SPAM", "APOLLO", "GaLore"])
def test_the_text_has_the_counts_of_float32_weights(name):
    found = counts_of(method_of(name), "350m", precision="amp-bf16")
    assert re.search(rf"At 350m .*?--precision amp-bf16`\).*?\b{name} {found}\b", TEXT)


def test_the_text_has_the_count_of_muon_with_float32_weights():
    assert f"at 60m Muon takes {counts_of('muon', '60m', precision='amp-bf16')}." in TEXT


def test_the_text_has_the_kernels_of_the_loss():
    half, full = (
        loss_kernels(SIZES["60m"], 131_072, dtype=dtype).total
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert f"{half} kernels for 131,072 tokens in bf16 and amp-bf16, {full} in fp32" in TEXT
