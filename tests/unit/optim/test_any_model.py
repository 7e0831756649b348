"""Layers, techniques and optimizers on models that are not this project's own."""

import copy

import pytest
import torch
from optimizer_rows import ROWS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowrank_lab import factorize, refactorize_, reset_momentum_
from lowrank_lab.layers import FactorizedLinear, LowRankLinear
from lowrank_lab.techniques import prune_moments_
from lowrank_lab.training.gradients import PerLayerUpdates

KINDS = ("low-rank", "lora", "sltrain")
MOMENTS = {"exp_avg", "exp_avg_sq"}


def conv_net():
    """Convolution, normalisations, an embedding beside it and two linear layers."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16),
        nn.LayerNorm(16), nn.ReLU(),
    )  # fmt: skip
    return nn.ModuleDict({"body": net, "head": nn.Linear(16, 5)})


def conv_loss(model, step=0):
    chance = torch.Generator().manual_seed(step % 4)
    images, classes = torch.randn(32, 1, 6, 6, generator=chance), torch.arange(32) % 5
    images += classes.view(-1, 1, 1, 1)
    return nn.functional.cross_entropy(model["head"](model["body"](images)), classes)


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def llama_loss(model, step=0):
    """Each token is followed by the next number."""
    first = torch.randint(64, (16, 1), generator=torch.Generator().manual_seed(step % 4))
    tokens = (first + torch.arange(12)) % 64
    return model(input_ids=tokens, labels=tokens).loss


MODELS = {"conv": (conv_net, conv_loss, r"\.4$|^head$"), "llama": (llama, llama_loss, "_proj$")}


def is_matrix(p):
    return p.ndim == 2 and min(p.shape) >= 3


def split(model):
    """The matrices of linear layers, and everything else."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = [p for p in model.parameters() if p.requires_grad]
    ranked = [p for p in params if id(p) in linear - tied and is_matrix(p)]
    return ranked, [p for p in params if all(p is not q for q in ranked)]


def optimizer_of(row, model):
    """The optimizer of a row on this model; LORO gets the factors of its factorised layers."""
    if row.kind == "whole":
        return row.cls(model.parameters(), lr=1e-2, **row.keys)
    if row.kind == "factors":
        layers = [m for m in model.modules() if isinstance(m, FactorizedLinear)]
        matrices = [f for layer in layers for f in layer.factors()]
        rest = [p for p in model.parameters() if all(p is not f for f in matrices)]
    else:
        matrices, rest = split(model)
    ranked = {"rank": 3} if row.kind != "marked" else {}
    return row.cls([{"params": rest}, {"params": matrices, **ranked, **row.keys}], lr=1e-2)


FIRST_ROWS = {row.cls: row for row in reversed(ROWS)}  # the row of a class, not its variants
OPTIMIZERS = {row.name: row for row in FIRST_ROWS.values()}


def made(model_name, name):
    """A model, its loss and this optimizer; LORO trains factors."""
    build, loss, target = MODELS[model_name]
    model, row = build(), OPTIMIZERS[name]
    if row.kind == "factors":
        factorize(model, rank=3, target=target, init="spectral")
    return model, loss, optimizer_of(row, model)


def train(model, loss, optimizer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        value = loss(model, step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def state_of(optimizer):
    return copy.deepcopy(list(optimizer.state.values()))


# Layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_name", MODELS)
def test_layers_that_are_not_linear_or_do_not_match_stay_the_same_objects(model_name, kind):
    build, loss, target = MODELS[model_name]
    model = build()
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    others = {n: m for n, m in model.named_modules() if n not in linear}
    values = copy.deepcopy(dict(model.named_parameters()))
    assert factorize(model, kind, rank=3, target=target) is model
    modules, after = dict(model.named_modules()), dict(model.named_parameters())
    assert all(modules[name] is module for name, module in others.items())
    replaced = {n for n, m in modules.items() if isinstance(m, FactorizedLinear)}
    assert replaced == linear - {"lm_head"}
    for name, value in values.items():
        inside = name.rpartition(".")[0] in replaced
        assert (inside and name not in after) or torch.equal(after[name], value)
    loss(model).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("model_name", MODELS)
def test_lora_starts_as_the_model_it_was_put_into(model_name):
    build, loss, target = MODELS[model_name]
    torch.testing.assert_close(
        loss(factorize(build(), "lora", rank=3, target=target)), loss(build())
    )


def test_tied_embeddings_stay_tied():
    model = factorize(llama(tied=True), rank=3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, llama_loss, optimizer, 2)
    refactorize_(model, optimizer, "transport")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_layer_is_not_factorized_and_nothing_is_replaced(kind):
    model = llama(tied=True)
    with pytest.raises(ValueError, match=r"^target: lm_head shares its weight with .*embed_tokens"):
        factorize(model, kind, rank=3, target="_proj$|lm_head")
    assert not any(isinstance(m, FactorizedLinear) for m in model.modules())


@pytest.mark.parametrize("model_name", MODELS)
def test_a_refactorization_keeps_what_the_model_computes(model_name):
    build, loss, target = MODELS[model_name]
    model = factorize(build(), rank=3, target=target)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, loss, optimizer, 3)
    with torch.no_grad():
        before = loss(model)
        done = refactorize_(model, optimizer, "transport")
        assert len(done.changed) == sum(isinstance(m, LowRankLinear) for m in model.modules())
        torch.testing.assert_close(loss(model), before, rtol=1e-5, atol=1e-5)


# Optimizers and techniques


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_every_optimizer_trains_every_parameter_of_any_model(model_name, name):
    model, loss, optimizer = made(model_name, name)
    before = copy.deepcopy(dict(model.named_parameters()))
    losses = train(model, loss, optimizer, 48)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    for key, p in model.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_of_torch_sets_the_learning_rate(name):
    model, loss, optimizer = made("conv", name)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, loss, optimizer, 1)
    schedule.step()
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, loss, optimizer, 1)  # before the next exact step of LORO
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_states_go_on_bit_for_bit(name):
    model, loss, optimizer = made("conv", name)
    train(model, loss, optimizer, 5)
    twin, _, other = made("conv", name)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, loss, optimizer, 6, 5) == train(twin, loss, other, 6, 5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loaded_groups_are_the_ones_that_are_stepped(name):
    model, loss, optimizer = made("conv", name)
    train(model, loss, optimizer, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, loss, optimizer, 1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_a_reset_empties_all_moments_and_nothing_else(model_name, name):
    model, loss, optimizer = made(model_name, name)
    train(model, loss, optimizer, 3)
    before, weights = state_of(optimizer), copy.deepcopy(model.state_dict())
    assert reset_momentum_(optimizer) == len(list(model.parameters()))
    for state, old in zip(optimizer.state.values(), before, strict=True):
        for key in state.keys() & MOMENTS:
            assert not state[key].any()
        for key in state.keys() & {"projection_left", "projection_right"}:
            assert torch.equal(state[key], old[key])
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(map(torch.isfinite, map(torch.tensor, train(model, loss, optimizer, 3, 3))))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_half_a_reset_leaves_half_of_the_averages(name):
    model, loss, optimizer = made("conv", name)
    train(model, loss, optimizer, 3)
    before = state_of(optimizer)
    reset_momentum_(optimizer, 0.5)
    for state, old in zip(optimizer.state.values(), before, strict=True):
        if "exp_avg_sq" in old:
            torch.testing.assert_close(state["exp_avg_sq"], 0.5 * old["exp_avg_sq"])
        if "exp_avg_weight" in old and "exp_avg" in old:
            torch.testing.assert_close(state["exp_avg"], 0.5 * old["exp_avg"])
            assert state["exp_avg_weight"] == 0.5 * old["exp_avg_weight"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_any_optimizer_can_be_pruned(name):
    model, loss, optimizer = made("conv", name)
    train(model, loss, optimizer, 3)
    parameters = [p for p in model.parameters() if "exp_avg" in optimizer.state[p]]
    assert prune_moments_(optimizer, parameters, keep=0.25) == len(parameters) > 1
    for state in (optimizer.state[p] for p in parameters):
        m = state["exp_avg"]
        assert m.count_nonzero() <= round(0.25 * m.numel())


@pytest.mark.parametrize("name", [n for n, row in OPTIMIZERS.items() if row.kind != "factors"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_transformers_can_be_updated_layer_by_layer(tied, name):
    ours, theirs = llama(tied), llama(tied)
    optimizer, reference = (optimizer_of(OPTIMIZERS[name], m) for m in (ours, theirs))
    PerLayerUpdates(ours, optimizer)
    for step in range(3):
        llama_loss(ours, step).backward()
    train(theirs, llama_loss, reference, 3)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# transformers' Trainer


class Texts(torch.utils.data.Dataset):
    """Twenty sequences of 12 tokens."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        chance = torch.Generator().manual_seed(index)
        tokens = torch.randint(64, (12,), generator=chance)
        return {"input_ids": tokens, "labels": tokens}


def trainer_of(model, optimizer, folder, **options):
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", logging_steps=1, disable_tqdm=True, seed=0,
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=Texts(), optimizers=(optimizer, schedule)
    )


def galore(model):
    return optimizer_of(OPTIMIZERS["galore"], model)


def factorized_adamw(model):
    factorize(model, rank=3)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("make", [galore, factorized_adamw])
def test_the_trainer_of_transformers_trains_all_weights(make, tmp_path):
    model = llama()
    optimizer = make(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer = trainer_of(model, optimizer, tmp_path)
    result = trainer.train()
    assert result.global_step == 5
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 5
    assert all(torch.tensor(losses).isfinite())
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 6)


@pytest.mark.parametrize("make", [galore, factorized_adamw])
def test_the_trainer_goes_on_from_its_checkpoint_bit_for_bit(make, tmp_path):
    models = []
    for folder, saved in (
        ("whole", {}),
        ("cut", {"save_strategy": "steps", "save_steps": 3}),
        ("cut", {}),
    ):
        models.append(llama())
        trainer = trainer_of(models[-1], make(models[-1]), tmp_path / folder, **saved)
        again = len(models) == 3
        trainer.train(
            resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3") if again else None
        )
    whole_model, _, resumed = models
    for p, q in zip(whole_model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
