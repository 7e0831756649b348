"""Merged products: equal losses and gradients, fewer kernels, and not where they don't belong."""

import copy
from functools import partial

import pytest
import torch
from compiling import counting
from loss_and_gradients import loss_and_gradients
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import block_kernels
from lowrank_lab import factorize
from lowrank_lab.config import SIZES
from lowrank_lab.device import cuda_path
from lowrank_lab.layers import LoRALinear
from lowrank_lab.layers.merged import merged_linear, pays
from lowrank_lab.models import llama, merged
from lowrank_lab.models.llama import Llama
from lowrank_lab.training.gradients import PerLayerUpdates

TINY = SIZES["tiny"]
KINDS = {
    "dense": ("", {}),
    "low-rank": ("low-rank", {}),
    "lora": ("lora", {}),
    "cola": ("cola", {}),
    "sltrain": ("sltrain", {}),  # not merged
}
MERGED = ["dense", "low-rank", "lora", "cola"]
TOKENS = torch.arange(512).view(4, 128) % 300


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """LoRA's products in this order; tiny ones would go through the weight."""
    monkeypatch.setattr(LoRALinear, "association", lambda *_, **__: "factors")


def model_of(kind, rank=4, size=TINY, **options):
    torch.manual_seed(0)
    model, (layers, more) = Llama(size, initializer_range=0.1, **options), KINDS[kind]
    if layers:
        factorize(model, layers, rank=rank, **more)
        for name, p in model.named_parameters():
            if name.endswith(".B"):  # LoRA starts it at zero
                nn.init.normal_(p, std=0.1)
    return model


answers = partial(loss_and_gradients, tokens=TOKENS)


def assert_equal(found, expected, error=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        assert (found[name] - value).norm() <= error * value.norm(), name


class Joint(TorchDispatchMode):
    """Counts the results of products by their width."""

    def __init__(self):
        super().__init__()
        self.widths, self.count = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.widths.add(out.shape[-1])
            self.count += 1
        return out


def widths(kind):
    """Of the merged products of q, k, v and of gate, up."""
    if kind == "dense":
        return {3 * TINY.hidden_size, 2 * TINY.intermediate_size}
    return {12, 8}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_no_loss_and_no_gradient(kind, checkpointing):
    model = model_of(kind, activation_checkpointing=checkpointing).double()
    with Joint() as plain:
        expected = answers(model)
    with cuda_path(), Joint() as products:
        assert_equal(answers(model), expected)
    assert not widths(kind) & plain.widths
    assert (widths(kind) <= products.widths) == (kind in MERGED)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_merging_rounds_no_worse(kind, autocast, monkeypatch):
    model = model_of(kind)
    exact = answers(model)
    if not autocast:
        model.bfloat16()
    with cuda_path():
        found = answers(model, autocast=autocast)
        monkeypatch.setattr(merged, "pays", lambda *_: False)
        apart = answers(model, autocast=autocast)
    for name, value in exact.items():
        assert found[name].dtype == apart[name].dtype
        errors = ((t[name].float() - value).norm() for t in (found, apart))
        assert next(errors) <= 1.5 * next(errors) + 2**-8 * value.norm(), name


@pytest.mark.parametrize("kind", MERGED)
def test_a_block_launches_fewer_kernels(kind, monkeypatch):
    model = model_of(kind)
    with cuda_path():
        with Joint() as together:
            answers(model)
        monkeypatch.setattr(merged, "pays", lambda *_: False)
        with Joint() as apart:
            answers(model)
    # two products of q, k, v and one of gate, up; forward, and twice in the backward pass
    assert apart.count - together.count == 3 * 3 * TINY.num_layers


@pytest.mark.parametrize(
    ("size", "kind", "saved"),
    [("60m", None, 16), ("1b", None, 24), ("60m", "low-rank", 6), ("60m", "sltrain", 0)],
)
def test_blocks_of_real_sizes_launch_fewer_kernels(size, kind, saved):
    one, several = (block_kernels(SIZES[size], kind, merged=m).total for m in (True, False))
    assert several - one >= saved
    assert one <= (110 if kind is None else 200)


@pytest.mark.parametrize("kind", MERGED)
def test_compiled_blocks_share_one_graph(kind, monkeypatch):
    with counting(monkeypatch, "aot_eager"), cuda_path():
        model = model_of(kind).double()
        expected = answers(model)
        model.compile_blocks()
        for _ in range(2):
            assert_equal(answers(model), expected, 1e-6)
            losses = model.token_losses(TOKENS, TOKENS.flip(1))
            assert abs(losses.mean() - expected["loss"]) <= 1e-6
        # blocks, last norm and the loss's softmax, with gradients and without
        assert counters["stats"]["unique_graphs"] <= 6
        assert not counters["graph_break"]


@pytest.mark.parametrize("kind", MERGED)
def test_hooks_on_a_layer_are_called(kind):
    model, seen = model_of(kind).double(), []
    expected = answers(model)
    block = model.model.layers[0]
    for layer in (block.self_attn.k_proj, block.mlp.gate_proj):
        layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    with cuda_path(), Joint() as products:
        assert_equal(answers(model), expected)
    assert seen == [TINY.hidden_size, TINY.intermediate_size]
    assert widths(kind) <= products.widths  # of the other block


def test_layers_of_one_s_own_are_called():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = model_of("dense").double()
    model.model.layers[1].self_attn.v_proj.__class__ = Own
    expected = answers(model)
    with cuda_path():
        assert_equal(answers(model), expected)


@pytest.mark.parametrize("frozen", ["q_proj", "gate_proj", "q_proj k_proj v_proj", "embed_tokens"])
def test_frozen_weights_get_no_gradient(frozen):
    model = model_of("dense").double()
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen.split()))
    expected = answers(model)
    with cuda_path():
        assert_equal(answers(model), expected)


def test_updates_per_layer_see_each_gradient_once():
    finals = []
    for on_cuda in (False, True):
        model = model_of("dense").double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        PerLayerUpdates(model, optimizer)
        for _ in range(2):
            if on_cuda:
                with cuda_path():
                    answers(model)
            else:
                answers(model)
        finals.append(dict(model.named_parameters()))
    assert_equal(*finals)


def test_parameters_stay_apart_and_the_backward_pass_keeps_none_of_them_twice():
    model, kept = model_of("dense"), []

    def keep(t):
        kept.append(t)
        return t

    names = list(model.state_dict())
    with cuda_path(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        answers(model)
    assert list(model.state_dict()) == names
    weights = {p.data_ptr() for p in model.parameters()}
    joint_rows = {3 * TINY.hidden_size, 2 * TINY.intermediate_size}
    assert not [t for t in kept if t.ndim == 2 and t.shape[0] in joint_rows]
    assert weights & {t.data_ptr() for t in kept}


def saved_bytes(model):
    """Bytes of all storages that the backward pass waits for, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def keep(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.loss(TOKENS, TOKENS)
    del loss
    return sum(n for pointer, n in found.items() if pointer not in own)


@pytest.mark.parametrize("kind", MERGED)
def test_merging_keeps_no_more_activations(kind, monkeypatch):
    model = model_of(kind)
    with cuda_path():
        together = saved_bytes(model)
        monkeypatch.setattr(merged, "pays", lambda *_: False)
        assert together <= saved_bytes(model)


def test_tensors_without_values_are_merged():
    model = model_of("dense").to("meta")
    tokens = TOKENS.to("meta")
    with cuda_path(), Joint() as products:
        model.loss(tokens, tokens).backward()
    assert widths("dense") <= products.widths


def test_under_autocast_a_block_takes_float32_too(monkeypatch):
    block = model_of("dense").model.layers[0]
    x, tables = torch.randn(4, 64, TINY.hidden_size), llama.rotary_tables(64, 16)
    found = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(merged, "pays", lambda *_: False)
        with cuda_path(), torch.autocast("cpu", torch.bfloat16):
            block(x, *tables).float().square().sum().backward()
        found.append({name: p.grad for name, p in block.named_parameters()})
        block.zero_grad()
    assert_equal(*found, 2**-5)


def test_it_pays_on_cuda_s_path_for_many_tokens():
    weights = [torch.empty(6, 4), torch.empty(10, 4)]
    assert not pays(torch.empty(2, 8, 4), weights)
    with cuda_path():
        assert pays(torch.empty(2, 8, 4), weights)
        assert not pays(torch.empty(3, 5, 4), weights)
        assert not pays(torch.empty(2, 8, 5), weights)  # an input with zero columns
        assert not pays(torch.empty(2, 8, 4), [weights[0], weights[1].double()])


def test_results_of_different_widths_are_those_of_each_weight():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(m, 4, dtype=torch.float64, requires_grad=True) for m in (1, 6, 2)]
    found = merged_linear(x, weights)
    expected = [nn.functional.linear(x, W) for W in weights]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    slopes = [torch.randn_like(y) for y in expected]
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, *weights), slopes),
        torch.autograd.grad(expected, (x, *weights), slopes),
    )


def test_functions_agree_with_numerical_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    q, k, v, gate, up = (
        torch.randn(m, 4, dtype=torch.float64, requires_grad=True) for m in (4, 4, 4, 5, 5)
    )
    tables = [t.double() for t in llama.rotary_tables(3, 2)]
    heads = lambda x, *W: merged.rotary_heads(x, W, *tables, 2)  # noqa: E731
    assert torch.autograd.gradcheck(heads, (x, q, k, v))
    assert torch.autograd.gradcheck(lambda x, *W: merged.swiglu(x, W, 8), (x, gate, up))


def test_copies_of_a_model_compute_the_same():
    model = model_of("dense").double()
    with cuda_path():
        expected = answers(model)
        assert_equal(answers(copy.deepcopy(model)), expected)
