"""The LLaMA model: against transformers' own, autograd's gradients and the plain loss."""

import copy
import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kernels import KernelCount, loss_kernels
from lowrank_lab.config import SIZES, Size
from lowrank_lab.device import cuda_path
from lowrank_lab.models import cross_entropy, rms_norm
from lowrank_lab.models.cross_entropy import linear_cross_entropy
from lowrank_lab.models.llama import Llama, RMSNorm
from lowrank_lab.models.rotary import rotary_tables, rotate

TINY = SIZES["tiny"]
SHAPES = [TINY, SIZES["micro"], Size(48, 65, 3, 1, 97), Size(16, 8, 8, 3, 11)]


def pair(size, attention="sdpa"):
    """Our model and transformers' with the same weights, larger than usual so that errors show."""
    torch.manual_seed(0)
    ours = Llama(size, initializer_range=0.1)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=128,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        attn_implementation=attention,
    )
    theirs = LlamaForCausalLM(config)
    for name, p in ours.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())  # strict: the names are the same, one to one
    return ours, theirs


def some_tokens(size, batch=2, length=40, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(size.vocab_size, (batch, length), generator=chance)


def relative(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# Against transformers


@pytest.mark.parametrize("size", SHAPES)
def test_parameter_names_and_shapes_are_those_of_transformers(size):
    ours, theirs = pair(size)
    mine = {name: p.shape for name, p in ours.state_dict().items()}
    assert mine == {name: p.shape for name, p in theirs.state_dict().items()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", SHAPES)
def test_logits_are_those_of_transformers(size, attention):
    ours, theirs = pair(size, attention)
    tokens = some_tokens(size)
    with torch.no_grad():
        difference = ours(tokens) - theirs(tokens).logits
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (1, 128)])
def test_logits_are_those_of_transformers_at_any_length(batch, length):
    ours, theirs = pair(TINY)
    tokens = some_tokens(TINY, batch, length)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("size", SHAPES)
def test_loss_and_gradients_are_those_of_transformers(size):
    ours, theirs = pair(size)
    tokens = some_tokens(size)
    loss = ours.loss(tokens[:, :-1], tokens[:, 1:])
    their_loss = theirs(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    mine, others = gradients(ours, loss), gradients(theirs, their_loss)
    for name, gradient in others.items():
        assert relative(mine[name], gradient) <= 2e-5, name


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_empty_input_gives_empty_logits(batch, length):
    assert Llama(TINY)(some_tokens(TINY, batch, length)).shape == (batch, length, TINY.vocab_size)


def test_initial_weights_have_the_range_that_was_asked_for():
    torch.manual_seed(0)
    for name, p in Llama(SIZES["micro"], initializer_range=0.03).named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert p.std().item() == pytest.approx(0.03, rel=0.05)


# The loss


def reference_loss(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets)


def loss_inputs(dtype=torch.float32, count=50, size=12, vocabulary=31):
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, size, generator=chance).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=chance).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (count,), generator=chance)


@pytest.fixture(
    params=product([1, 7, 50, 1000], ["cpu", "cuda"]), ids=lambda pair: f"{pair[0]}-{pair[1]}"
)
def chunk(request, monkeypatch):
    """Tokens in a chunk (one, unevenly, all, more than there are), and the device's path."""
    tokens, path = request.param
    for name in ("LOGITS_IN_CHUNK", "LOGITS_ON_CUDA"):
        monkeypatch.setattr(cross_entropy, name, 4 * tokens * 31)
    monkeypatch.setattr(cross_entropy, "SMALLEST_CHUNK", 1)
    with cuda_path() if path == "cuda" else nullcontext():
        yield tokens


@pytest.mark.parametrize("upstream", [1.0, -0.25, 0.0])
def test_the_chunked_loss_is_the_plain_one_with_its_gradients(chunk, upstream):
    hidden, weight, targets = loss_inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    mine = torch.autograd.grad(loss * upstream, (hidden, weight))
    exact = reference_loss(hidden.double(), weight.double(), targets)
    expected = torch.autograd.grad(exact * upstream, (hidden, weight))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for gradient, reference in zip(mine, expected, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-5, atol=1e-7)


def test_a_bfloat16_loss_is_float32_and_right_to_its_rounding(chunk):
    hidden, weight, targets = loss_inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    mine = torch.autograd.grad(loss, (hidden, weight))
    double = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = reference_loss(*double, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2**-8)
    for gradient, reference in zip(mine, torch.autograd.grad(exact, double), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient.double(), reference) <= 2**-6


def test_autocast_computes_the_loss_in_its_dtype_and_gives_float32_gradients(chunk):
    hidden, weight, targets = loss_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected = linear_cross_entropy(*half, targets)
    assert loss.item() == expected.item()
    mine, others = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, half)
    for gradient, other in zip(mine, others, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, other.float())


def test_without_gradients_the_loss_takes_one_product_per_chunk(chunk):
    hidden, weight, targets = loss_inputs()
    expected = reference_loss(hidden, weight, targets).item()
    with torch.no_grad(), KernelCount() as count:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert count.kernels["mm"] == math.ceil(50 / min(50, chunk))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert not loss.requires_grad


@pytest.mark.parametrize("size", ["60m", "130m", "350m", "1b"])
def test_a_loss_of_131072_tokens_launches_at_most_300_kernels_on_cuda(size):
    trained, evaluated = (
        loss_kernels(SIZES[size], 512 * 256, gradients=gradients) for gradients in (True, False)
    )
    assert trained.kernels["mm"] == 3 * evaluated.kernels["mm"]
    assert evaluated.total < trained.total <= 300


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_frozen_head_or_frozen_hidden_states_get_no_gradient(chunk, wanted):
    inputs = loss_inputs()
    inputs[1 - wanted].requires_grad_(False)
    linear_cross_entropy(*inputs).backward()
    expected = torch.autograd.grad(reference_loss(*inputs), inputs[wanted])[0]
    assert torch.allclose(inputs[wanted].grad, expected, rtol=1e-5, atol=1e-7)
    assert inputs[1 - wanted].grad is None


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_the_loss_survives_tiny_and_huge_logits(size):
    hidden, weight, targets = loss_inputs()
    loss = linear_cross_entropy(size * hidden, weight, targets)
    expected = reference_loss(size * hidden.double(), weight.double(), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert weight.grad.isfinite().all()


def test_the_model_s_loss_is_the_mean_cross_entropy_of_its_logits():
    ours, _ = pair(TINY)
    tokens, targets = some_tokens(TINY), some_tokens(TINY, seed=1)
    expected = F.cross_entropy(ours(tokens).flatten(0, 1), targets.flatten())
    assert ours.loss(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)


# The parts


def norm_formula(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("shape", [(5,), (1, 6), (2, 3, 5)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_rmsnorm_and_its_gradients_follow_the_formula_in_float64(shape, size):
    torch.manual_seed(0)
    norm, x = RMSNorm(shape[-1]), (size * torch.randn(shape)).requires_grad_()
    norm.weight.data.uniform_(-2, 2)
    upstream, out = torch.randn(shape), norm(x)
    mine = torch.autograd.grad(out, (x, norm.weight), upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    exact = norm_formula(*wide)
    assert relative(out.double(), exact) <= 1e-6
    for gradient, reference in zip(mine, torch.autograd.grad(exact, wide, upstream), strict=True):
        assert relative(gradient.double(), reference) <= 1e-5


def test_rmsnorm_of_zeros_is_zero_with_finite_gradients():
    norm, x = RMSNorm(4), torch.zeros(3, 4, requires_grad=True)
    norm(x).sum().backward()
    assert torch.allclose(x.grad, torch.full((3, 4), 1e3))  # 1/√ε
    assert not norm.weight.grad.any()


def test_rmsnorm_passes_gradcheck_in_float64():
    norm = RMSNorm(5).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm._RMSNorm.apply, (x, norm.weight))


def test_bfloat16_rmsnorm_is_right_to_its_rounding():
    torch.manual_seed(0)
    norm, x = RMSNorm(64).bfloat16(), torch.randn(7, 64).bfloat16()
    exact = norm_formula(x.double(), norm.weight.detach().double())
    assert relative(norm(x).double(), exact) <= 2**-8


def test_rotation_passes_gradcheck_in_float64():
    cos, sin = (table.double() for table in rotary_tables(4, 6))
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_rotation_is_by_position_times_frequency_in_the_plane_of_each_pair():
    x = torch.randn(1, 1, 9, 6, dtype=torch.float64)
    cos, sin = (table.double() for table in rotary_tables(9, 6))
    angle = torch.arange(9.0)[:, None].double() / 10_000 ** (torch.arange(3).double() / 3)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    assert relative(rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1)) <= 1e-6


def test_future_tokens_do_not_change_earlier_logits():
    ours, _ = pair(TINY)
    tokens = some_tokens(TINY, length=20)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % TINY.vocab_size
    before, after = ours(tokens), ours(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert ((before[:, 12:] - after[:, 12:]).abs().amax(dim=(0, 2)) > 1e-3).all()


def test_sequences_of_a_batch_do_not_see_each_other():
    ours, _ = pair(TINY)
    tokens = some_tokens(TINY, batch=3)
    alone = torch.cat([ours(row[None]) for row in tokens])
    assert torch.allclose(ours(tokens), alone, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients():
    ours, _ = pair(TINY)
    frugal = Llama(TINY, activation_checkpointing=True)
    frugal.load_state_dict(ours.state_dict())
    tokens, targets = some_tokens(TINY), some_tokens(TINY, seed=1)
    mine = gradients(ours, ours.loss(tokens, targets))
    for name, gradient in gradients(frugal, frugal.loss(tokens, targets)).items():
        assert torch.equal(gradient, mine[name]), name


@pytest.mark.parametrize("lengths", [(3, 40), (40, 3, 40), (1, 2, 64)])
def test_sequences_of_changing_length_give_what_a_fresh_model_gives(lengths):
    ours, _ = pair(TINY)
    fresh = copy.deepcopy(ours)
    for length in lengths[:-1]:
        ours(some_tokens(TINY, length=length))
    tokens = some_tokens(TINY, length=lengths[-1])
    assert torch.equal(ours(tokens), fresh(tokens))


def test_training_goes_on_after_inference_mode():
    ours, _ = pair(TINY)
    tokens = some_tokens(TINY)
    with torch.inference_mode():
        ours(tokens)
    ours.loss(tokens, tokens).backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_a_float64_model_is_float64_throughout():
    ours, theirs = pair(TINY)
    tokens = some_tokens(TINY)
    logits, expected = ours.double()(tokens), theirs.double()(tokens).logits
    assert logits.dtype == torch.float64
    assert relative(logits, expected) <= 1e-6


def test_a_bfloat16_model_is_as_near_to_the_float32_one_as_transformers_is():
    ours, theirs = pair(SIZES["micro"])
    tokens = some_tokens(SIZES["micro"])
    with torch.no_grad():
        exact = ours(tokens)
        mine, others = ours.bfloat16()(tokens), theirs.bfloat16()(tokens).logits
    assert mine.dtype == torch.bfloat16
    assert relative(mine.float(), exact) <= 1.25 * relative(others.float(), exact)


def test_a_block_compiles_into_one_graph():
    ours, _ = pair(TINY)
    x = torch.randn(2, 8, TINY.hidden_size).bfloat16().requires_grad_()
    cos, sin = (table.bfloat16() for table in ours._rotary(8, x.device))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(ours.model.layers[0].forward)(x, cos, sin)
    assert (found.graph_count, found.graph_break_count) == (1, 0)
