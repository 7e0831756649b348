"""Groups from a model: each trainable parameter in exactly one, and the targets in the first."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

import lowrank_lab as lab
from lowrank_lab.models.llama import Llama
from lowrank_lab.optim import GaLore, Loro, param_groups

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(kind=AutoModelForCausalLM, **keys):
    return kind.from_config(LlamaConfig(**SMALL, **keys, pad_token_id=0))


def gpt2():
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return AutoModelForCausalLM.from_config(config)


def conv_net():
    return nn.ModuleDict(
        {"head": nn.Linear(16, 5), "body": nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 16),
            nn.LayerNorm((4, 4)),
        )}
    )  # fmt: skip


def factorized(kind):
    return lab.factorize(Llama(lab.RunConfig(model="tiny").size), kind, rank=4)


def frozen():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    return model


def wrapped():
    return nn.ModuleDict({"module": llama()})


MODELS = {
    "llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "wrapped": wrapped,
    "base": lambda: llama(AutoModel), "classes": lambda: llama(AutoModelForSequenceClassification),
    "bert": lambda: AutoModel.from_config(BertConfig(**SMALL)), "gpt2": gpt2, "conv": conv_net,
    "sequence": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 24), "frozen": frozen,
    "meta": lambda: Llama(lab.RunConfig(model="tiny").size).to("meta"),
    "low-rank": lambda: factorized("low-rank"), "lora": lambda: factorized("lora"),
    "sltrain": lambda: factorized("sltrain"),
}  # fmt: skip


def names_of(groups):
    return [name for group in groups for name in group["param_names"]]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_each_trainable_parameter_is_in_exactly_one_group(name, weight_decay):
    model = MODELS[name]()
    groups = param_groups(model, rank=2, target="all-linear", weight_decay=weight_decay)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sorted(names_of(groups)) == sorted(trainable)
    for group in groups:
        assert group["params"]
        for n, p in zip(group["param_names"], group["params"], strict=True):
            assert p is trainable[n]
    assert groups[0]["rank"] == 2
    assert all("rank" not in group for group in groups[1:])
    assert all(p.ndim == 2 for p in groups[0]["params"])


LAST_PARTS = {
    "llama": PROJECTIONS, "tied": PROJECTIONS, "wrapped": PROJECTIONS, "base": PROJECTIONS,
    "classes": PROJECTIONS, "bert": ("query", "key", "value", "dense"),
    "gpt2": ("c_attn", "c_proj", "c_fc"), "conv": ("3",), "sequence": ("0",),
    "attention": ("out_proj", "linear1"), "meta": PROJECTIONS,
}  # fmt: skip


@pytest.mark.parametrize("name", LAST_PARTS)
def test_all_linear_layers_are_projected_but_the_head_and_tied_ones(name):
    ranked, rest = param_groups(MODELS[name](), rank=2, target="all-linear")
    assert {n.split(".")[-2] for n in ranked["param_names"]} == set(LAST_PARTS[name])
    expected = {n for n in rest["param_names"] if n.split(".")[-1] == "weight"} & {
        "lm_head.weight", "score.weight", "head.weight", "2.weight", "linear2.weight",
        "module.lm_head.weight", "pooler.dense.weight",
    }  # fmt: skip
    heads = {"llama", "classes", "conv", "sequence", "meta", "wrapped", "attention", "bert"}
    assert bool(expected) == (name in heads)


def test_embeddings_the_head_norms_and_biases_are_in_the_second_group():
    ranked, rest = param_groups(gpt2(), rank=4, target="all-linear", scale=1.0, update_proj_gap=7)
    assert ranked["scale"] == 1.0
    assert ranked["update_proj_gap"] == 7
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight",
            "transformer.h.0.attn.c_attn.bias"} <= set(rest["param_names"])  # fmt: skip
    assert rest.keys() == {"params", "param_names"}


def test_decay_leaves_out_biases_and_norms_and_keeps_every_matrix():
    ranked, rest, undecayed = param_groups(
        conv_net(), rank=2, target=r"^body\.3$", weight_decay=0.1
    )
    assert [g["weight_decay"] for g in (ranked, rest, undecayed)] == [0.1, 0.1, 0.0]
    assert rest["param_names"] == ["head.weight", "body.0.weight"]
    assert undecayed["param_names"] == [
        "head.bias", "body.0.bias", "body.1.weight", "body.1.bias", "body.3.bias",
        "body.4.weight", "body.4.bias",
    ]  # fmt: skip


def test_sparse_entries_are_decayed_as_the_matrix_that_they_belong_to():
    _, rest, undecayed = param_groups(factorized("sltrain"), rank=4, weight_decay=0.1)
    assert any(name.endswith(".values") for name in rest["param_names"])
    assert all("norm" in name for name in undecayed["param_names"])


@pytest.mark.parametrize("kind", ["low-rank", "lora"])
def test_factors_are_pairs_that_loro_takes(kind):
    model = factorized(kind)
    groups = param_groups(model, rank=4, update_k=5)
    assert [n[-1] for n in groups[0]["param_names"]] == ["B", "A"] * 14
    optimizer = Loro(groups, lr=0.01)
    model(torch.zeros(1, 4, dtype=torch.long)).square().mean().backward()
    optimizer.step()


def test_a_hugging_face_model_trains_with_them():
    model = llama()
    optimizer = GaLore(param_groups(model, rank=4, target="all-linear", weight_decay=0.1), lr=0.01)
    tokens = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert "model.layers.0.mlp.up_proj.weight" in optimizer.param_groups[0]["param_names"]


@pytest.mark.parametrize("package", [torch.optim.AdamW, lab.optim.Spam])
def test_groups_without_a_rank_suit_other_optimizers(package):
    _, *plain = param_groups(llama(), rank=4, weight_decay=0.1)
    assert [g["weight_decay"] for g in package(plain).param_groups] == [0.1, 0.0]


# Refusals


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (llama, "c_attn", r"it matches no linear layer; the model has .*\.q_proj \(2×\)"),
        (lambda: nn.Conv2d(1, 1, 3), "all-linear", ".* the model has none, but Conv2d$"),
        (nn.ReLU, "x", ".* the model has none, but no parameters either$"),
        (llama, "(", "'all-linear' or a regular expression: "),
        (llama, None, "'all-linear' or a regular expression: "),
        (lambda: llama().requires_grad_(False), "q_proj", ".* has no trainable matrix$"),
        (lambda: llama(tie_word_embeddings=True), "all_linear", "it matches no linear layer; "),
    ],
)  # fmt: skip
def test_a_target_that_matches_nothing_is_refused_with_what_the_model_has(model, target, message):
    with pytest.raises(ValueError, match=rf"^target: .* is not allowed; {message}") as refusal:
        param_groups(model(), rank=2, target=target)
    assert "\n" not in str(refusal.value)


def test_matrices_that_are_smaller_than_the_rank_are_named_or_left_out():
    model = conv_net()
    with pytest.raises(ValueError, match=r"^rank: 6 is not allowed; .*head\.weight \(5, 16\)$"):
        param_groups(model, rank=6, target="")
    ranked, rest = param_groups(model, rank=6, target="", skip_small=True)
    assert ranked["param_names"] == ["body.3.weight"]
    assert "head.weight" in rest["param_names"]
    with pytest.raises(ValueError, match=r"^rank: 99 is not allowed; one that fits: .*\(5, 16\)"):
        param_groups(model, rank=99, target="", skip_small=True)


def test_the_smaller_factors_are_named_too():
    with pytest.raises(ValueError, match=r"^rank: 5 .*q_proj\.B \(32, 4\).* and 22 more$"):
        param_groups(factorized("low-rank"), rank=5)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": 2.0}, {"weight_decay": -1.0}])
def test_bad_values_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name}: "):
        param_groups(llama(), **({"rank": 2} | bad))


def test_a_key_that_the_optimizer_does_not_have_is_refused_by_it():
    with pytest.raises(ValueError, match=r"^alpha: "):
        GaLore(param_groups(llama(), rank=2, alpha=1.0))
