"""Compiled functions: graphs of their own, equal results, copies; and the compiled loss."""

import copy
import pickle

import pytest
import torch
from compiling import counting
from torch._dynamo.utils import counters

from lowrank_lab.config import SIZES, InputError
from lowrank_lab.models import compiled
from lowrank_lab.models.compiled import Compiled
from lowrank_lab.models.cross_entropy import FusedLosses, linear_cross_entropy
from lowrank_lab.models.llama import Llama


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    with counting(monkeypatch, "aot_eager"):
        yield


def scaled(x, factor=3.0):
    return x * factor


def graphs():
    return counters["stats"]["unique_graphs"]


def test_evaluation_and_training_have_a_graph_each():
    function, x = Compiled(scaled), torch.ones(3, requires_grad=True)
    for _ in range(2):
        function(x).sum().backward()
        with torch.no_grad():
            assert torch.equal(function(x), 3 * x)
    assert graphs() == 2


def test_more_functions_than_torch_s_limit_compile_for_themselves():
    for size in range(2, torch._dynamo.config.recompile_limit + 4):
        assert Compiled(scaled)(torch.ones(size)).sum() == 3 * size
    assert graphs() == torch._dynamo.config.recompile_limit + 2


def test_closures_are_no_functions_of_a_module():
    factor = 2.0
    with pytest.raises(AssertionError):
        Compiled(lambda x: x * factor)


def test_copies_and_pickles_of_a_compiled_model_compute_the_same():
    torch.manual_seed(0)
    model, tokens = Llama(SIZES["tiny"]), torch.arange(24).view(2, 12)
    model.compile_blocks()
    expected = model.loss(tokens, tokens)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.loss(tokens, tokens), expected)
        first, second = other.model.layers
        assert first.compiled is second.compiled is not model.model.layers[0].compiled


def loss_inputs(dtype, count, vocabulary=31):
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 12, generator=chance).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 12, generator=chance).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (count,), generator=chance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_plain_one_with_its_gradients(dtype, monkeypatch):
    monkeypatch.setattr("lowrank_lab.models.cross_entropy.LOGITS_IN_CHUNK", 16 * 31 * 4)
    monkeypatch.setattr("lowrank_lab.models.cross_entropy.SMALLEST_CHUNK", 1)
    fused, rounding = FusedLosses(), 1e-6 if dtype == torch.float32 else 2**-8
    for count in (50, 33, 48):  # chunks of many lengths, the last one of 1 row in the second
        hidden, weight, targets = loss_inputs(dtype, count)
        results = []
        for how in (fused, None):
            loss = linear_cross_entropy(hidden, weight, targets, how)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
            with torch.no_grad():
                again = linear_cross_entropy(hidden, weight, targets, how)
            assert again.item() == pytest.approx(loss.item(), rel=1e-6)
        assert results[0][0].dtype == torch.float32
        for mine, other in zip(*results, strict=True):
            assert (mine - other).norm() <= rounding * other.norm()
    assert graphs() == 2  # with gradients and without


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4])
def test_the_compiled_loss_survives_tiny_and_huge_logits(size):
    hidden, weight, targets = loss_inputs(torch.float32, 20)
    loss = linear_cross_entropy(size * hidden, weight, targets, FusedLosses())
    expected = torch.nn.functional.cross_entropy(
        size * hidden.double() @ weight.double().T, targets
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(t.grad.isfinite().all() for t in (hidden, weight))


@pytest.mark.parametrize("shorter", [1, 3])
def test_tokens_may_have_more_sequences_than_targets(shorter):
    torch.manual_seed(0)
    model, tokens = Llama(SIZES["tiny"]), torch.randint(500, (4, 8))
    expected = model.loss(tokens[:shorter], tokens[:shorter])
    torch.testing.assert_close(model.loss(tokens, tokens[:shorter]), expected)


def without_compiler(graph, inputs):
    raise RuntimeError("no compiler found\nand more lines")


def test_what_torch_cannot_compile_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", without_compiler)
    with pytest.raises(
        InputError, match=r"compile: True is not allowed; .*no compiler found.*; False"
    ) as error:
        Compiled(scaled)(torch.ones(3))
    assert "\n" not in str(error.value)
