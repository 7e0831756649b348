"""All linear layers as a target, for layers and for runs."""

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_lab as lab
from lowrank_lab.layers import FactorizedLinear, target_layers
from lowrank_lab.models.llama import Llama


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.score, self.out = nn.Linear(8, 8), nn.Linear(8, 8)


def names(model, target="all-linear"):
    return [name for name, _ in target_layers(model, target)]


def test_a_stack_without_a_head_has_no_head():
    assert names(nn.ModuleList([Block(), Block()])) == ["0.score", "0.out", "1.score", "1.out"]


def test_the_last_layer_is_the_head_where_nothing_says_more():
    model = nn.Sequential(nn.ModuleList([Block(), Block()]), nn.Linear(8, 3))
    assert names(model)[-1] == "0.1.out"


def test_a_layer_that_stands_in_a_model_twice_is_left_out():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    assert names(model) == ["c"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["low-rank", "lora", "sltrain", "cola"])
def test_factorize_replaces_all_linear_layers_but_the_head(kind, tied):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = lab.factorize(LlamaForCausalLM(config), kind, rank=4, target="all-linear")
    assert sum(isinstance(m, FactorizedLinear) for m in model.modules()) == 14
    assert type(model.lm_head) is nn.Linear
    assert names(model) == [n for n, m in model.named_modules() if isinstance(m, FactorizedLinear)]


def test_a_bare_layer_is_its_own_head():
    with pytest.raises(ValueError, match="target: 'all-linear' matches no linear layer"):
        lab.factorize(nn.Linear(8, 8), rank=2, target="all-linear")


@pytest.mark.parametrize("target", ["(", None, 7])
def test_what_is_no_pattern_is_refused(target):
    with pytest.raises(ValueError, match=r"^target: .* is not allowed; 'all-linear' or a regular"):
        names(nn.Linear(8, 8), target)


def test_all_linear_layers_of_a_run_are_its_default_targets():
    config = lab.RunConfig(model="tiny", target="all-linear")
    assert config == lab.RunConfig(model="tiny")
    assert config.replace(target="all-linear") == config
    model = Llama(config.size)
    assert names(model) == names(model, config.target)
