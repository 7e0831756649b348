"""`factorize`, `to_dense_` and `factorization`: what they carry over, name and refuse."""

import copy
import json
import warnings

import pytest
import torch
from short import INIT, WITH_WEIGHT
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers.pytorch_utils import Conv1D

import lowrank_lab as lab
from lowrank_lab.config import TARGETS
from lowrank_lab.layers import KINDS, FactorizedLinear, LowRankLinear, skipped_layers
from lowrank_lab.layers.trained import ABOVE_RANDOM, above_random, looks_trained
from lowrank_lab.methods.build import build_model
from lowrank_lab.methods.resolve import resolve

kinds = pytest.mark.parametrize("kind", KINDS)
with_weight = pytest.mark.parametrize("kind", WITH_WEIGHT)


def stack(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8, bias=False), *layers)


def excited(model, kind, target=".", rank=2, **options):
    lab.factorize(model, kind, rank=rank, target=target, init=INIT[kind], **options)
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):
            nn.init.normal_(layer.B, std=0.3)
    return model


@pytest.fixture(autouse=True)
def no_other_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="lowrank_lab|tests|test_")
        yield


# What is carried over


@with_weight
def test_hooks_training_mode_and_attributes_are_carried_over_and_back(kind):
    model, calls = stack().eval(), []
    first = model[0]
    first.tag = "kept"
    handles = [
        first.register_forward_pre_hook(lambda *_: calls.append("before")),
        first.register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True),
        first.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    bias = first.bias
    for convert in (lambda: excited(model, kind), lambda: lab.to_dense_(model)):
        convert()
        calls.clear()
        model(torch.randn(3, 8, requires_grad=True)).sum().backward()
        assert calls == ["before", "after", "backward"]
        assert (model[0].tag, model[0].training, model[0].bias) == ("kept", False, bias)
    assert type(model[0]) is nn.Linear
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(3, 8)).sum().backward()
    assert not calls


@pytest.mark.parametrize("kind", ["low-rank", "sltrain"])
def test_frozen_layers_stay_frozen_there_and_back(kind):
    model = stack()
    model[0].weight.requires_grad_(False)
    excited(model, kind)
    assert [p.requires_grad for p in (model[0].B, model[0].A, model[2].B)] == [False, False, True]
    lab.to_dense_(model)
    assert [model[0].weight.requires_grad, model[2].weight.requires_grad] == [False, True]
    assert model[0].bias.requires_grad


# What is skipped


class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Plain(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8))


def with_forward(linear):
    linear.forward = lambda x: x
    return linear


def with_tensor_hook(linear):
    linear.weight.register_hook(lambda g: g)
    return linear


SKIPPED = {
    "Masked has a forward": lambda: Masked(8, 8),
    "Experts is no nn.Linear (down_proj 4×8×8)": Experts,
    "its weight is computed by a parametrisation": lambda: parametrizations.orthogonal(
        nn.Linear(8, 8)
    ),
    "its weight is computed by": lambda: weight_norm(nn.Linear(8, 8)),
    "its weight is computed": lambda: prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5),
    "its shape is unknown": lambda: nn.LazyLinear(8),
    "its weight is torch.complex64": lambda: nn.Linear(8, 8, dtype=torch.complex64),
    "its forward is replaced": lambda: with_forward(nn.Linear(8, 8)),
    "its weight has tensor hooks": lambda: with_tensor_hook(nn.Linear(8, 8)),
    "MultiheadAttention is no nn.Linear (in_proj_weight 24×8)": lambda: nn.MultiheadAttention(8, 2),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("reason", SKIPPED)
@kinds
def test_layers_that_are_left_as_they_are_are_named_with_the_reason(kind, reason):
    module = SKIPPED[reason]()
    model = stack(module)
    with pytest.warns(UserWarning, match=r"^target: left as they are: 3 \(") as warned:
        lab.factorize(model, kind, rank=2, target=r"^[023](\.down_proj)?$", init=INIT[kind])
    (line,) = [str(w.message) for w in warned if w.category is UserWarning]
    assert reason in line
    assert model[3] is module
    assert {type(model[0]), type(model[2])} == {KINDS[kind]}
    assert reason in skipped_layers(model, r"^[023](\.down_proj)?$")["3"]


def test_layers_within_a_module_that_is_left_are_replaced_or_named_themselves():
    model = stack(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2))
    with_tensor_hook(model[4].out_proj)
    with pytest.warns(UserWarning, match=r"3, 4 \(Multi.*; 4\.out_proj \(its weight has tensor"):
        lab.factorize(model, rank=2, target=".")
    assert isinstance(model[3].out_proj, LowRankLinear)
    assert isinstance(model[4].out_proj, nn.Linear)


def test_a_warning_as_an_error_leaves_the_model_as_it_was():
    model = stack(Masked(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="left as they are"):
            lab.factorize(model, rank=2, target=".")
    assert type(model[0]) is nn.Linear


def test_embeddings_convolutions_and_norms_are_not_named():
    model = stack(nn.Embedding(4, 8), nn.Conv1d(2, 3, 3), nn.LayerNorm(8), nn.BatchNorm1d(8))
    assert not skipped_layers(model, ".")
    lab.factorize(model, rank=2, target=".")


def test_a_pattern_that_matches_no_linear_layer_says_what_it_matches():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), Masked(8, 8), nn.Tanh())
    allowed = r"^target: '{}' matches no linear layer of the model"
    with pytest.raises(ValueError, match=allowed.format("0") + r"; it matches 0 \(Conv1d\)$"):
        lab.factorize(model, rank=2, target="0")
    with pytest.raises(ValueError, match=allowed.format("1") + r"; it matches 1 \(Masked has"):
        lab.factorize(model, rank=2, target="1")
    with pytest.raises(ValueError, match=allowed.format("x") + "$"):
        lab.factorize(model, rank=2, target="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": None}, r"^rank: None is not allowed"),
        (
            {"sparsity": 0.1},
            r"^options: 'sparsity' is not allowed; low-rank takes alpha, init, decompose_on$",
        ),
        ({"rank": 7}, r"^rank: 7 is not allowed; .* \(layer 0\)$"),
    ],
)
def test_a_bad_request_is_refused_with_the_field_or_the_layer(arguments, message):
    model = stack()
    with pytest.raises(ValueError, match=message):
        lab.factorize(model, **{"rank": 2, "target": ".", **arguments})
    assert type(model[0]) is nn.Linear


# Subclasses and Conv1D


@pytest.mark.parametrize("dense", [Plain, lambda n, m: Conv1D(m, n)])
@with_weight
def test_layers_that_compute_as_linear_ones_are_replaced_and_come_back_in_their_class(kind, dense):
    model = nn.Sequential(dense(8, 6))
    original = model[0]
    excited(model, kind)
    layer, x = model[0], torch.randn(3, 8)
    assert type(layer) is KINDS[kind]
    assert layer.weight.shape == original.weight.shape  # in×out for Conv1D
    expected = layer(x)
    lab.to_dense_(model)
    assert type(model[0]) is type(original)
    assert repr(model[0]) == repr(original)
    assert model[0].state_dict().keys() == original.state_dict().keys()
    torch.testing.assert_close(model[0](x), expected)


def test_lora_of_a_conv1d_starts_at_its_function_and_spectral_keeps_its_weight():
    conv, x = Conv1D(6, 8), torch.randn(3, 8)
    for kind, options in (("lora", {}), ("low-rank", {"init": "spectral"})):
        model = lab.factorize(
            nn.Sequential(copy.deepcopy(conv)), kind, rank=6, target="0", **options
        )
        torch.testing.assert_close(model(x), conv(x))
        torch.testing.assert_close(model[0].weight.detach().clone(), conv.weight.detach())


# to_dense_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank", [1, 6])
@with_weight
def test_back_to_dense_is_the_exact_product_rounded_once(kind, rank, dtype):
    model = excited(stack().to(dtype), kind, rank=rank)
    exact = copy.deepcopy(model).double()
    assert lab.to_dense_(model) is model
    for i in (0, 2):
        assert type(model[i]) is nn.Linear
        assert torch.equal(model[i].weight, exact[i].dense_weight().to(dtype))
        assert isinstance(model[i].weight, nn.Parameter)
    assert not [m for m in model.modules() if isinstance(m, FactorizedLinear)]
    assert repr(model) == repr(stack())


def test_a_layer_in_two_places_comes_back_as_one():
    layer = LowRankLinear(nn.Linear(8, 8), 2)
    model = lab.to_dense_(nn.ModuleDict({"a": layer, "b": layer}))
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"]


def test_a_bare_factorised_layer_can_not_be_replaced_in_place():
    with pytest.raises(ValueError, match=r"^model: a bare factorised layer"):
        lab.to_dense_(LowRankLinear(nn.Linear(8, 8), 2))


# factorization


def test_a_factorisation_goes_through_json_and_builds_the_same_layers():
    model = stack(nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, 4))
    excited(model, "low-rank", "^0$", rank=3, alpha=0.7)
    excited(model, "lora", "^2$", rank=6)
    excited(model, "sltrain", "^[34]$", sparsity=0.123, keep_weight=True)
    spec = json.loads(json.dumps(lab.factorization(model)))
    assert [group["layers"] for group in spec["groups"]] == [["0"], ["2"], ["3", "4"]]
    other = stack(nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, 4))
    assert lab.factorize(other, spec) is other
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))
    assert repr(other) == repr(model)
    assert lab.factorization(other) == lab.factorization(model)
    assert lab.factorization(stack()) == {"version": 1, "groups": []}


GROUP = {"kind": "low-rank", "rank": 2, "scale": 1.0, "layers": ["0"]}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, r"^version: None is not allowed; 1, as `factorization` writes it$"),
        ({"version": 2, "groups": []}, r"^version: 2 "),
        ({"version": 1, "groups": [GROUP | {"kind": "lowrank"}]}, r"^kind: 'lowrank' .*low-rank"),
        ({"version": 1, "groups": [{"layers": ["0"]}]}, r"^groups: one has no kind$"),
        ({"version": 1, "groups": [GROUP | {"layers": ["9"]}]}, r"^layers: '9' .* it has none$"),
        ({"version": 1, "groups": [GROUP | {"layers": ["1"]}]}, r"^layers: '1' .* a Tanh$"),
        ({"version": 1, "groups": [GROUP | {"rank": 9}]}, r"^rank: 9 .*\(layer 0\)$"),
    ],
)
def test_a_factorisation_that_does_not_fit_is_refused(spec, message):
    model = stack()
    with pytest.raises(ValueError, match=message):
        lab.factorize(model, spec)
    assert type(model[0]) is nn.Linear


def test_a_factorisation_takes_no_other_argument():
    with pytest.raises(ValueError, match=r"^rank: with a factorisation"):
        lab.factorize(stack(), {"version": 1, "groups": []}, rank=2)


# Trained weights

INITS = {
    "default": lambda W: None,
    "normal": lambda W: nn.init.normal_(W, std=0.02),
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "truncated": lambda W: nn.init.trunc_normal_(W, std=0.02),
    "zeros": nn.init.zeros_,
    "eye": nn.init.eye_,
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("m", "n"), [(2, 2), (8, 8), (3, 64), (64, 48), (300, 200)])
def test_initialised_weights_do_not_look_trained(m, n, init):
    torch.manual_seed(0)
    linears = [nn.Linear(n, m) for _ in range(8)]
    for linear in linears:
        INITS[init](linear.weight)
    assert not looks_trained([linear.weight for linear in linears])
    assert max(above_random(linear.weight) for linear in linears) < 1.06 < ABOVE_RANDOM


def trained(how):
    model = stack()
    if how == "spectrum":  # as after long training: a large singular value among random ones
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(6, 8) + 9 * torch.ones(6, 8))
        return model
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(10 if how == "steps" else 1):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    if how == "steps":
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("how", ["gradient", "steps", "spectrum"])
@pytest.mark.parametrize(
    ("kind", "offer"), [("low-rank", "spectral"), ("sltrain", "lora"), ("cola", "lora")]
)
def test_throwing_trained_weights_away_is_warned_of_with_the_other_way(kind, offer, how):
    with pytest.warns(UserWarning, match=rf"^kind: '{kind}' .*trained.*\"{offer}\"") as warned:
        lab.factorize(trained(how), kind, rank=2, target=".")
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("low-rank", {"init": "spectral"}), ("low-rank", {"init": "kaiming"}), ("lora", {}),
     ("cola", {"init": "normal"})],
)  # fmt: skip
def test_keeping_trained_weights_or_asking_for_new_ones_is_silent(kind, options):
    lab.factorize(trained("gradient"), kind, rank=2, target=".", **options)


def test_new_weights_are_replaced_in_silence():
    lab.factorize(stack(), rank=2, target=".")


def test_all_linear_layers_have_conv1d_among_them_and_matrices_that_are_none_are_named():
    model = stack(Experts(), Conv1D(8, 8), nn.Embedding(4, 8), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match=r"^target: left as they are: 3 \(Experts is no"):
        lab.factorize(model, rank=2, target="all-linear")
    assert [type(m) is LowRankLinear for m in model] == [True, False, True, False, True] + 2 * [
        False
    ]


@pytest.mark.parametrize("method", ["low-rank", "lora", "relora", "sltrain"])
@pytest.mark.parametrize("target", [TARGETS, r"mlp\."])
def test_the_library_s_own_models_are_built_in_silence(method, target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model(resolve(lab.RunConfig(model="tiny", method=method, target=target)))
