"""Bytes: measured ones against what can be counted by hand."""

import pytest
import torch
from short import QUICK
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_lab import InputError, RunConfig
from lowrank_lab.memory.breakdown import Breakdown, persistent, tensor_bytes
from lowrank_lab.memory.formulas import embedding_bytes, flops_per_token, optimizer_state_bytes
from lowrank_lab.methods.build import build
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve

# The model `tiny`: hidden 32, MLP 88, two layers, vocabulary 512.
RANK, VOCABULARY = 4, 512
EMBEDDINGS_AND_NORMS = 2 * VOCABULARY * 32 + 5 * 32
MATRICES = 2 * (4 * [(32, 32)] + 2 * [(88, 32)] + [(32, 88)])  # q k v o, gate up, down
DENSE = EMBEDDINGS_AND_NORMS + sum(m * n for m, n in MATRICES)
FACTORS = EMBEDDINGS_AND_NORMS + sum(RANK * (m + n) for m, n in MATRICES)
# A projection has r columns of the shorter side; the moments are r × the longer side.
PROJECTIONS = sum(RANK * min(shape) for shape in MATRICES)
PROJECTED_MOMENTS = 2 * (EMBEDDINGS_AND_NORMS + sum(RANK * max(shape) for shape in MATRICES))
STEP = 4  # torch's step counts and Fira's limiter are one float32 each
TENSORS, TENSORS_OF_FACTORS = 2 + 5 + len(MATRICES), 2 + 5 + 2 * len(MATRICES)

# method → elements of weights, of states, of projections, and bytes of float32 scalars
EXPECTED = {
    "full-rank": (DENSE, 2 * DENSE, 0, STEP * TENSORS),
    "low-rank": (FACTORS, 2 * FACTORS, 0, STEP * TENSORS_OF_FACTORS),
    "galore": (DENSE, PROJECTED_MOMENTS + PROJECTIONS, PROJECTIONS, 0),
    "fira": (DENSE, PROJECTED_MOMENTS + PROJECTIONS, PROJECTIONS, STEP * len(MATRICES)),
}


def built(method, precision, text_corpus):
    rank = {"rank": RANK} if METHODS[method].uses_rank else {}
    config = RunConfig(model="tiny", method=method, precision=precision, corpus=text_corpus, **rank)
    return build(resolve(config))


def step(model, optimizer):
    chance = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in model.parameters():
            if not p.requires_grad:
                continue
            p.grad = torch.randn(p.shape, generator=chance).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("amp-bf16", 4), ("bf16", 2)])
@pytest.mark.parametrize("method", EXPECTED)
def test_persistent_bytes_are_those_counted_by_hand(method, precision, size, text_corpus):
    model, optimizer = built(method, precision, text_corpus)
    step(model, optimizer)
    weights, states, projections, scalars = EXPECTED[method]
    measured = persistent(model, optimizer)
    assert measured == Breakdown(
        weights=size * weights,
        gradients=size * weights,
        optimizer_states=size * states + scalars,
        projections=size * projections,
    )


def test_an_optimizer_that_has_not_stepped_holds_no_states(text_corpus):
    model, optimizer = built("galore", "fp32", text_corpus)
    measured = persistent(model, optimizer)
    assert (measured.optimizer_states, measured.projections) == (0, 0)
    assert measured.weights == 4 * DENSE


def test_frozen_weights_have_no_gradients_and_tied_ones_count_once():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    net[0].weight = net[2].weight
    net[1].requires_grad_(False)
    measured = persistent(net, torch.optim.SGD(net.parameters(), lr=0.1))
    batch_norm = 4 * 4 * 3 + 8  # two parameters, two buffers, an int64 count
    assert measured.weights == 4 * 9 + batch_norm
    assert measured.gradients == 4 * 9


def test_bytes_of_tensors_are_of_their_elements_and_shared_memory_counts_once():
    x, half = torch.zeros(10), torch.zeros(3, dtype=torch.bfloat16)
    assert tensor_bytes([]) == 0
    assert tensor_bytes([torch.zeros(0), torch.tensor(1.0)]) == 4
    assert tensor_bytes([x, half]) == 46
    assert tensor_bytes([x, x, x.view(2, 5), x.view(2, 5).T]) == 40


def test_two_halves_of_one_buffer_count_as_the_whole():
    flat = torch.zeros(10)
    assert tensor_bytes([flat[:5], flat[5:]]) == 40


def test_a_view_of_a_tensor_counted_already_adds_nothing():
    x = torch.zeros(10)
    assert tensor_bytes([x, x[:4]]) == 40
    assert tensor_bytes([x[:4], x]) == 40


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", QUICK)
def test_states_are_the_bytes_of_the_formula(method, precision, text_corpus):
    model, optimizer = built(method, precision, text_corpus)
    step(model, optimizer)
    config = RunConfig(
        model="tiny", method=method, precision=precision, corpus=text_corpus, rank=RANK
    )
    assert persistent(model, optimizer).optimizer_states == optimizer_state_bytes(resolve(config))
    assert all(p.numel() for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", QUICK)
def test_bytes_of_embedding_and_head_are_those_that_they_and_their_states_take(
    method, precision, text_corpus
):
    model, optimizer = built(method, precision, text_corpus)
    step(model, optimizer)
    ends = [model.model.embed_tokens.weight, model.lm_head.weight]
    states = [v for p in ends for v in optimizer.state[p].values() if torch.is_tensor(v)]
    rank = {"rank": RANK} if METHODS[method].uses_rank else {}
    config = RunConfig(model="tiny", method=method, precision=precision, **rank)
    assert embedding_bytes(resolve(config)) == tensor_bytes([*ends, *states])


OTHERS = [
    ("galore", {"proj_type": "left"}), ("galore", {"proj_type": "full"}),
    ("fira", {"proj_type": "reverse_std"}), ("apollo", {"store_projection": False}),
    ("apollo-mini", {"proj_type": "right"}), ("spam", {"density": 0.3}),
    ("frugal", {"proj": "columns"}), ("frugal", {"proj": "columns", "proj_type": "right"}),
    ("ldadam", {"error_feedback": False}), ("cola", {"recompute": True}),
    ("sltrain", {"sparsity": 0.0}), ("sltrain", {"sparsity": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), OTHERS, ids=str)
def test_states_follow_the_options_of_the_method(method, options, text_corpus):
    config = RunConfig(model="tiny", method=method, method_options=options, rank=RANK)
    model, optimizer = build(resolve(config))
    step(model, optimizer)
    assert persistent(model, optimizer).optimizer_states == optimizer_state_bytes(resolve(config))
    assert all(p.numel() for group in optimizer.param_groups for p in group["params"])


def test_states_of_an_unknown_optimizer_have_no_formula():
    config = resolve(RunConfig(model="tiny", optimizer="torch.optim.NAdam"))
    with pytest.raises(InputError, match="no formula"):
        optimizer_state_bytes(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("method", ["full-rank", "low-rank", "lora", "sltrain", "cola", "galore"])
def test_flops_by_formula_are_those_that_are_counted(method, pieces, precision, text_corpus):
    rank = {"rank": 12} if METHODS[method].uses_rank else {}
    config = RunConfig(
        model="tiny", method=method, precision=precision, corpus=text_corpus, batch=4,
        sequence_length=16, gradient_accumulation=pieces, **rank,
    )  # fmt: skip
    config = resolve(config)
    model, _ = build(config)
    tokens = torch.randint(VOCABULARY, (4 // pieces, 16))
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in counts.items() if "attention" not in str(kind))
    attention = 6 * 2 * 16 * 32  # layers × length × width
    assert products == (flops_per_token(config) - attention) * tokens.numel()
