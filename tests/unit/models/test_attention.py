"""Causal attention: our kernels against the formula and against torch's own kernel."""

import pytest
import torch
import torch.nn.functional as F

from lowrank_lab.models import attention
from lowrank_lab.models.attention import causal_attention

SHAPES = [(1, 1, 1, 2), (2, 3, 5, 4), (1, 2, 128, 8), (2, 2, 129, 16), (3, 4, 300, 32)]


def inputs(shape, dtype=torch.bfloat16, size=1.0, seed=0):
    """q, k, v as the model gives them, (B, h, T, D) views of (B, T, h, D), and a gradient."""
    chance = torch.Generator().manual_seed(seed)
    B, h, T, D = shape
    drawn = (size * torch.randn(B, T, h, D, generator=chance) for _ in range(4))
    *qkv, upstream = (t.to(dtype).transpose(1, 2) for t in drawn)
    return [t.detach().requires_grad_() for t in qkv], upstream


def formula(q, k, v):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return scores.where(mask, -torch.inf).softmax(-1) @ v


def torchs(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def with_gradients(function, tensors, upstream):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


def relative(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()


@pytest.fixture(params=[(128, 1 << 19), (1, 1), (3, 50), (16, 1 << 10)], ids=str)
def blocks(request, monkeypatch):
    """Blocks as they are, of single rows and heads, and uneven ones."""
    monkeypatch.setattr(attention, "QUERY_ROWS", request.param[0])
    monkeypatch.setattr(attention, "SCORES_IN_FLIGHT", request.param[1])


@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (1, 2, 1, 2)])
def test_attention_passes_gradcheck_in_float64(blocks, shape):
    tensors, _ = inputs(shape, torch.float64)
    assert torch.autograd.gradcheck(attention._attention, tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_attention_and_its_gradients_follow_the_formula(blocks, shape):
    tensors, upstream = inputs(shape, torch.float64)
    mine = with_gradients(attention._attention, tensors, upstream)
    for ours, exact in zip(mine, with_gradients(formula, tensors, upstream), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_bfloat16_attention_is_as_near_to_the_formula_as_torch_s(shape, size):
    tensors, upstream = inputs(shape, size=size)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = with_gradients(formula, wide, upstream.double())
    mine = with_gradients(causal_attention, tensors, upstream)
    others = with_gradients(torchs, tensors, upstream)
    for ours, theirs, reference in zip(mine, others, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative(ours, reference) <= max(1.5 * relative(theirs, reference), 2**-8)


def test_other_dtypes_are_torch_s_own_kernel():
    tensors, upstream = inputs((2, 2, 9, 4), torch.float32)
    mine = with_gradients(causal_attention, tensors, upstream)
    others = with_gradients(torchs, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_nothing_in_gives_nothing_out(shape):
    tensors, _ = inputs(shape)
    assert causal_attention(*tensors).shape == shape


def test_huge_scores_give_finite_gradients():
    tensors, upstream = inputs((1, 2, 40, 8), size=1e3)
    for t in with_gradients(causal_attention, tensors, upstream):
        assert t.isfinite().all()


def test_the_operators_keep_the_rules_of_torch_s_library():
    tensors, _ = inputs((2, 2, 5, 4))
    torch.library.opcheck(attention._attention, tuple(tensors))


def test_mixed_precision_does_not_round_the_scores():
    tensors, upstream = inputs((2, 2, 129, 16))
    plain = with_gradients(causal_attention, tensors, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = with_gradients(causal_attention, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
