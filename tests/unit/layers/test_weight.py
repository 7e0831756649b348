"""`layer.weight` of factorised layers: its readers in torch, transformers and peft, and writers."""

import copy
import io

import peft
import pytest
import torch
import torch.nn.functional as F
from short import INIT, WITH_WEIGHT
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import T5Config, T5ForConditionalGeneration

from lowrank_lab.config import SIZES
from lowrank_lab.layers import (
    FactorizedLinear,
    LoRALinear,
    factorize,
    merge_,
    to_dense_,
)
from lowrank_lab.models.llama import Llama
from lowrank_lab.techniques import refactorize_

kinds = pytest.mark.parametrize("kind", WITH_WEIGHT)


def excited(model, kind, target=".", rank=2, **options):
    """The model with factorised layers whose B is not zero, as after some training."""
    factorize(model, kind, rank=rank, target=target, init=INIT[kind], **options)
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):
            nn.init.normal_(layer.B, std=0.3)
    return model


def layer_of(kind, m=5, n=6, dtype=torch.float32):
    torch.manual_seed(0)
    return excited(nn.Sequential(nn.Linear(n, m, dtype=dtype)), kind)[0]


def t5():
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, vocab_size=32,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


# What it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@kinds
def test_the_weight_is_the_dense_weight_in_shape_dtype_and_value(kind, dtype):
    layer = layer_of(kind, dtype=dtype)
    W = layer.weight
    assert (W.shape, W.dtype, W.device) == ((5, 6), dtype, layer.B.device)
    assert (W.ndim, W.numel(), len(W), W.requires_grad) == (2, 30, 5, True)
    assert isinstance(W, torch.Tensor)
    assert torch.equal(W, layer.dense_weight())
    assert torch.equal(W.detach().clone(), layer.dense_weight())
    x = torch.randn(3, 6, dtype=dtype)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(F.linear(x, W, layer.bias), layer(x), atol=tolerance)


@kinds
def test_its_gradient_reaches_the_parameters_through_operators_and_custom_functions(kind):
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W):
            ctx.save_for_backward(x)
            return x @ W.T

        @staticmethod
        def backward(ctx, g):
            return None, g.T @ ctx.saved_tensors[0]

    layer, x = layer_of(kind, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    parameters = [p for n, p in layer.named_parameters() if p.requires_grad and n != "bias"]
    g = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.autograd.grad((layer(x) * g).sum(), parameters)
    for product in (F.linear(x, layer.weight), Own.apply(x, layer.weight)):
        ours = torch.autograd.grad((product * g).sum(), parameters)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@kinds
def test_reading_its_facts_computes_nothing(kind, monkeypatch):
    layer, formed = layer_of(kind), []
    form = type(layer).form
    monkeypatch.setattr(type(layer), "form", lambda *args: formed.append(1) or form(*args))
    _ = layer.weight.dtype, layer.weight.device, layer.weight.shape, layer.weight.detach().dtype
    assert not formed
    layer.weight.norm()
    assert formed == [1]


@kinds
def test_it_can_be_printed_saved_copied_and_made_an_array(kind):
    layer = layer_of(kind)
    expected = layer.dense_weight().detach()
    W = layer.weight.detach()
    file = io.BytesIO()
    torch.save(W, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), expected)
    assert torch.equal(torch.from_numpy(W.numpy()), expected)
    assert torch.equal(torch.tensor(W.tolist()), expected)
    assert torch.equal(copy.deepcopy(W), expected)
    assert repr(W) == repr(expected)


@kinds
def test_it_works_when_compiled_vectorised_and_under_autocast(kind):
    layer, x = layer_of(kind), torch.randn(3, 6)
    expected = x @ layer.dense_weight().T

    def product(x):
        return F.linear(x, layer.weight)

    torch._dynamo.reset()
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.func.vmap(product)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.clone().dtype == torch.float32
        assert product(x).dtype == torch.bfloat16


WRITES = {
    "init": lambda layer: nn.init.normal_(layer.weight),
    "data": lambda layer: layer.weight.data.zero_(),
    "detach": lambda layer: layer.weight.detach().add_(1),
    "copy": lambda layer: layer.weight.data.copy_(torch.ones(5, 6)),
    "item": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "out": lambda layer: torch.ones(5, 6, out=layer.weight.detach()),
    "grad": lambda layer: setattr(layer.weight, "grad", torch.ones(5, 6)),
    "freeze": lambda layer: layer.weight.requires_grad_(False),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(5, 6))),
    "none": lambda layer: setattr(layer, "weight", None),
}


@pytest.mark.parametrize("how", WRITES)
@kinds
def test_a_write_is_refused_rather_than_lost(kind, how):
    layer = layer_of(kind)
    before = layer.dense_weight().detach()
    with pytest.raises(ValueError, match=r"^weight: (writing to|setting) it .*not allowed") as why:
        WRITES[how](layer)
    assert "\n" not in str(why.value)
    assert torch.equal(layer.dense_weight(), before)


# Who reads it


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("target", ["linear", "out_proj", "."])
@kinds
@pytest.mark.filterwarnings("ignore:target. left as they are")
def test_torch_s_transformer_computes_with_it_with_and_without_its_fast_path(kind, target, fast):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, dropout=0, batch_first=True), 2
    )
    excited(model, kind, target, rank=4)
    x = torch.randn(2, 5, 16)
    expected = to_dense_(copy.deepcopy(model)).eval()(x)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-5)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            out = model.eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("batch_first", [True, False])
@kinds
def test_attention_computes_with_the_weight_of_its_output_projection(kind, batch_first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    excited(attention, kind, "out_proj")
    dense = to_dense_(copy.deepcopy(attention))
    assert type(dense.out_proj) is type(nn.MultiheadAttention(8, 2).out_proj)
    x = torch.randn(3, 2, 8)
    for mode in (True, False):
        torch.testing.assert_close(attention.train(mode)(x, x, x), dense.train(mode)(x, x, x))


@kinds
def test_t5_computes_with_it_in_both_precisions(kind):
    model = excited(t5(), kind, r"\.(wi_0|wi_1|wo|q|k|v|o)$").eval()
    dense = to_dense_(copy.deepcopy(model))
    tokens = torch.arange(8)[None]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        ours, theirs = (
            m.to(dtype)(tokens, decoder_input_ids=tokens).logits for m in (model, dense)
        )
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@kinds
def test_transformers_initialisation_does_not_overwrite_it_in_silence(kind):
    model = excited(t5(), kind, r"\.wo$")
    with pytest.raises(ValueError, match=r"^weight: writing to it"):
        model._init_weights(model.encoder.block[0].layer[1].DenseReluDense)


@kinds
def test_peft_adapts_factorised_layers_that_it_is_told_of_and_others_beside_them(kind):
    torch.manual_seed(0)
    model = excited(nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)}), kind, "a")
    x = torch.randn(3, 6)
    expected = model["a"](x)
    for name in "ab":
        config = peft.LoraConfig(r=2, target_modules=[name])
        config._register_custom_module({FactorizedLinear: peft.tuners.lora.Linear})
        adapted = peft.inject_adapter_in_model(config, copy.deepcopy(model))
        torch.testing.assert_close(adapted["a"](x), expected)
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["b"]), copy.deepcopy(model)
    )
    torch.testing.assert_close(adapted["a"](x), expected)
    config = peft.LoraConfig(r=2, target_modules=["a"])
    with pytest.raises(ValueError, match="is not supported"):
        peft.inject_adapter_in_model(config, copy.deepcopy(model))


# The name of W₀


def test_an_old_state_dict_of_a_lora_layer_still_loads():
    layer, other = layer_of("lora"), LoRALinear(nn.Linear(6, 5), 2)
    old = {k.replace("base_weight", "weight"): v for k, v in layer.state_dict().items()}
    assert list(old) == ["weight", "B", "A", "bias"]
    net = nn.Sequential(other)
    net.load_state_dict({f"0.{k}": v for k, v in old.items()})
    assert torch.equal(other.dense_weight(), layer.dense_weight())


def test_a_dense_state_dict_loads_into_lora_layers_as_their_base():
    layer, dense = layer_of("lora"), nn.Linear(6, 5)
    found = layer.load_state_dict(dense.state_dict(), strict=False)
    assert set(found.missing_keys) == {"A", "B"}
    assert not found.unexpected_keys
    assert torch.equal(layer.base_weight, dense.weight)


@kinds
def test_the_library_s_own_model_computes_its_loss_with_a_factorised_head(kind):
    torch.manual_seed(0)
    model = excited(Llama(SIZES["tiny"]), kind, rank=4)
    dense, tokens = to_dense_(copy.deepcopy(model)), torch.randint(512, (2, 9))
    ours, theirs = (m.loss(tokens[:, :-1], tokens[:, 1:]) for m in (model, dense))
    torch.testing.assert_close(ours, theirs)
    ours.backward(), theirs.backward()
    head, G = model.lm_head, dense.lm_head.weight.grad
    torch.testing.assert_close(head.B.grad, head.scale * G @ head.A.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.A.grad, head.scale * head.B.T @ G, rtol=1e-4, atol=1e-5)


@kinds
def test_it_has_a_shape_on_fake_and_meta_tensors(kind):
    with FakeTensorMode():
        layer = layer_of(kind)
        F.linear(torch.ones(3, 6), layer.weight).sum().backward()
        assert layer.A.grad.shape == (2, 6)
    with torch.device("meta"):
        layer = layer_of(kind)
        assert layer.weight.is_meta
        assert F.linear(torch.ones(3, 6), layer.weight).shape == (3, 5)
        for tokens in (1, 1000):  # any order of products
            x = torch.ones(tokens, 6, requires_grad=True)
            layer(x).sum().backward()
            assert (layer.A.grad.shape, x.grad.shape) == ((2, 6), x.shape)


class Reader(nn.Module):
    """Multiplies by the weight itself, which autograd then saves."""

    def __init__(self, kind):
        super().__init__()
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        (self.layer,) = factorize(model, kind, rank=4, target="", init="kaiming")

    def forward(self, x):
        return x @ self.layer.weight


@pytest.mark.parametrize("kind", ["low-rank", "lora"])
def test_the_weight_of_a_functional_call_keeps_the_parameters_of_the_call(kind):
    torch.manual_seed(0)
    reader, x = Reader(kind), torch.randn(3, 8, requires_grad=True)
    given = {name: torch.randn_like(p) for name, p in reader.named_parameters()}
    out = torch.func.functional_call(reader, given, (x,))
    (found,) = torch.autograd.grad(out.sum(), x)
    W = reader.layer.scale * given["layer.B"] @ given["layer.A"]
    W = W + given.get("layer.base_weight", 0)
    torch.testing.assert_close(found, W.sum(1).expand(3, 8))


def test_a_factor_that_is_changed_before_the_backward_pass_is_an_error_as_in_a_dense_layer():
    reader, x = Reader("low-rank").requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    out = reader(x)
    with torch.no_grad():
        reader.layer.B.mul_(3)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


@pytest.mark.parametrize("kind", ["low-rank", "lora"])
@pytest.mark.parametrize("change", [refactorize_, lambda model: merge_(model, seed=0)])
def test_layers_that_share_a_factor_are_refused_before_any_change(kind, change):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    factorize(model, kind, rank=3, target="", init="kaiming")
    model[1].A = model[0].A
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="1 is not allowed; it shares a factor with 0"):
        change(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
