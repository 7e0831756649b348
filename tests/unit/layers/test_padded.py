"""Zero columns for kernels of aligned rows: the same losses and gradients, and no copies kept."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_and_gradients import loss_and_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_lab import factorize, to_dense_
from lowrank_lab.config import SIZES
from lowrank_lab.device import cuda_path
from lowrank_lab.layers import padded
from lowrank_lab.layers.padded import AlignedLinear, padded_linear, padded_width
from lowrank_lab.models import compiled
from lowrank_lab.models.llama import Llama

ODD = SIZES["tiny"]._replace(intermediate_size=85)
TARGET = "(gate|up|down)_proj"


@pytest.fixture(autouse=True)
def all_dtypes(monkeypatch):
    """Pad products of float32 and float64 too, in which rounding hides no error."""
    monkeypatch.setattr(padded, "PADDED", (torch.bfloat16, torch.float32, torch.float64))


def model_of(kind, rank=8, **options):
    torch.manual_seed(0)
    model = Llama(ODD, initializer_range=0.1)  # larger than usual, so that errors show
    if kind:
        factorize(model, kind, rank=rank, target=TARGET, **options)
        for name, p in model.named_parameters():
            if name.endswith(".B"):  # LoRA and SLTrain start it at zero
                nn.init.normal_(p, std=0.1)
    return model


answers = partial(loss_and_gradients, tokens=torch.arange(128).view(2, 64) % 50)


class Products(TorchDispatchMode):
    """Sizes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.sizes |= {*left.shape, *right.shape}
        return func(*args, **(kwargs or {}))


CASES = [
    ("", {}),
    ("low-rank", {}),
    ("low-rank", {"rank": 32}),  # through the weight
    ("lora", {}),
    ("lora", {"rank": 32}),
    ("sltrain", {}),
    ("sltrain", {"keep_weight": True}),
    ("cola", {}),
]
IDS = [" ".join(map(str, (kind or "dense", *options.values()))) for kind, options in CASES]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_padding_changes_no_loss_and_no_gradient(kind, options):
    model = model_of(kind, **options).double()
    plain = answers(model)
    with cuda_path(), Products() as products:
        found = answers(model)
    assert 88 in products.sizes
    assert 85 not in products.sizes - plain_sizes(kind)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert found[name].shape == value.shape
        assert (found[name] - value).norm() <= 1e-12 * value.norm(), name


def plain_sizes(kind):
    """SLTrain's small products of factors and G, which no token enters, stay as they are."""
    return {85} if kind == "sltrain" else set()


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_padding_is_right_to_the_rounding_of_bfloat16(kind, options):
    model = model_of(kind, **options)
    plain = answers(model, autocast=True)
    with cuda_path():
        found = answers(model, autocast=True)
    for name, value in plain.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= 2**-5 * value.norm(), name


@pytest.mark.parametrize("kind", ["", "low-rank", "lora", "sltrain", "cola"])
def test_the_backward_pass_keeps_no_padded_matrix(kind):
    model, kept = model_of(kind), []

    def keep(t):
        kept.append(t.shape)
        return t

    with cuda_path(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        answers(model)
    assert [shape for shape in kept if len(shape) == 2 and 88 in shape] == []


@pytest.mark.parametrize("kind", ["", "sltrain"])
def test_padded_blocks_compile_into_one_graph(kind, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch.compiler.reset()
    model = model_of(kind)
    with cuda_path():
        plain = answers(model)
        model.compile_blocks()
        for name, value in answers(model).items():
            assert (value - plain[name]).norm() <= 1e-5 * plain[name].norm(), name


def test_weights_are_stored_without_padding_and_layers_convert():
    model = model_of("")
    with cuda_path():
        answers(model)
    assert {p.untyped_storage().nbytes() // 4 for p in model.model.layers[0].mlp.parameters()} == {
        85 * 32
    }
    expected = answers(model)["loss"]
    factorize(model, "low-rank", rank=32, target=TARGET, init="spectral")
    with cuda_path():
        torch.testing.assert_close(answers(to_dense_(model))["loss"], expected)
    assert isinstance(model.model.layers[0].mlp.up_proj, AlignedLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_alone_is_padded_and_on_cuda_s_path_alone(dtype, monkeypatch):
    monkeypatch.undo()
    x, layer = torch.zeros(2, 32, dtype=dtype), AlignedLinear(32, 85)
    assert padded_width(x, layer, layer) is None
    with cuda_path():
        assert padded_width(x, layer) == (88 if dtype == torch.bfloat16 else None)
        assert padded_width(x, AlignedLinear(32, 88)) is None
        assert padded_width(x, layer, nn.Linear(32, 85)) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert padded_width(x, layer) == 88


def test_a_layer_of_one_s_own_is_called_without_padding():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = model_of("")
    expected = answers(model)["loss"]
    model.model.layers[0].mlp.down_proj.__class__ = Own
    with cuda_path():
        torch.testing.assert_close(answers(model)["loss"], expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("columns", "rows"), [(0, None), (3, None), (0, 8), (3, 8)])
def test_a_padded_product_is_the_product_beside_zeros(bias, columns, rows):
    torch.manual_seed(0)
    linear = AlignedLinear(6, 5, bias=bias).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    wide = F.pad(x, (0, columns)).requires_grad_()
    y = linear(wide, rows)
    assert torch.equal(y[..., 5:], torch.zeros(2, 3, (rows or 5) - 5))
    narrow = x.requires_grad_()
    expected = F.linear(narrow, linear.weight, linear.bias)
    torch.testing.assert_close(y[..., :5], expected)
    slope = torch.randn_like(expected)
    mine = torch.autograd.grad(y[..., :5], (wide, *linear.parameters()), slope)
    theirs = torch.autograd.grad(expected, (narrow, *linear.parameters()), slope)
    torch.testing.assert_close((mine[0][..., :6], *mine[1:]), theirs)
    assert not mine[0][..., 6:].any()


def test_frozen_weights_and_inputs_get_no_gradient():
    W, x = torch.randn(5, 6), torch.randn(3, 6, requires_grad=True)
    padded_linear(x, W, None, 8).sum().backward()
    assert x.grad.shape == x.shape
    W.requires_grad_()
    padded_linear(x.detach(), W, None, 8).sum().backward()
    assert W.grad.shape == W.shape
