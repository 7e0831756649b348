"""What the kernels do with inputs that are no ordinary ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from lowrank_lab.kernels import operators as kernels
from lowrank_lab.models.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
NANS = [0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FC001FF, -0x400000]  # their bits


def nan_of(bits):
    return torch.tensor([bits], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("bits", NANS)
@pytest.mark.parametrize(("vocabulary", "at"), [(7, 6), (9, 3), (9, 8), (16, 15)])
def test_every_nan_among_logits_makes_the_loss_and_its_slopes_nan(bits, vocabulary, at):
    logits, losses = torch.zeros(2, vocabulary), torch.zeros(2, 1)
    logits[0, at : at + 1] = nan_of(bits)
    kernels.losses_(logits, torch.tensor([[1], [1]]), losses, True)
    assert losses[0].isnan()
    assert logits[0].isnan().all()
    assert losses[1].item() == pytest.approx(math.log(vocabulary))


@pytest.mark.parametrize("bits", NANS)
def test_every_nan_of_a_query_makes_its_row_of_attention_nan(bits):
    q, k, v = torch.randn(3, 1, 20, 1, 16).unbind()
    q[0, 9, 0, :1] = nan_of(bits)
    out = kernels.rotary_attention(q, k, v, torch.ones(20, 8), torch.zeros(20, 8))
    assert out[0, 9].isnan().all()
    assert out[0, :9].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("spread", [False, True])
def test_targets_of_any_whole_numbers_and_strides(dtype, spread):
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    targets = torch.tensor([0, 10, 3, 3, 7], dtype=dtype)
    if spread:
        targets = torch.stack([targets, targets + 1], 1)[:, 0]
    expected = F.cross_entropy(hidden @ weight.T, targets.long())
    assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("targets", [torch.zeros(4).long(), torch.zeros(5), torch.zeros(0).long()])
def test_other_targets_are_refused(targets):
    with pytest.raises(ValueError, match="is not allowed; 5 whole numbers"):
        linear_cross_entropy(torch.randn(5, 8), torch.randn(11, 8), targets)


@pytest.mark.parametrize("target", [-100, -1, 11, 2**40])
def test_a_target_that_is_no_token_is_refused(target):
    targets = torch.tensor([0, 1, target])
    with pytest.raises(IndexError, match="targets: 1 are not allowed; 0 to 10"):
        linear_cross_entropy(torch.randn(3, 8), torch.randn(11, 8), targets)


@pytest.fixture
def on_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_and_gradients_are_the_same_bits_on_any_number_of_threads(on_threads):
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 50, 2, 32)] * 3 + [(300, 96), (96,), (77, 13), (77, 13), (50, 16), (50, 16)]
    given = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    q, k, v, x, weight, gate, up, cos, sin = given
    results = []
    for count in (1, 2, 5):
        on_threads(count)
        outs = [
            kernels.rotary_attention(q, k, v, cos.detach(), sin.detach()),
            kernels.rms_norm(x, weight, 1e-6),
            kernels.swiglu(gate, up),
        ]
        leaves = [q, k, v, x, weight, gate, up]
        results.append([*outs, *torch.autograd.grad([out.square().sum() for out in outs], leaves)])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_swiglu_of_infinite_and_of_very_negative_numbers_is_that_of_torch():
    values = [-math.inf, math.inf, -1e4, -104.0, -95.0, -88.1, -87.9, 90.0]
    gate, up = torch.tensor(values).requires_grad_(), torch.full((8,), 2.0).requires_grad_()
    ours, theirs = kernels.swiglu(gate, up), F.silu(gate) * up
    mine, others = (torch.autograd.grad(y.sum(), (gate, up)) for y in (ours, theirs))
    for a, b in zip((ours, *mine), (theirs, *others), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-36, equal_nan=True)
