"""Updating each weight within the backward pass: the same weights, and one gradient at a time."""

import copy

import pytest
import torch
from short import QUICK, per_layer_options, short_options
from torch import nn

from lowrank_lab import METHODS, InputError, RunConfig, load_runs, train
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim import (
    Apollo,
    Fira,
    Frugal,
    GaLore,
    LDAdam,
    NorMuon,
    Scale,
    Spam,
    StableSpam,
)
from lowrank_lab.training.gradients import PerLayerUpdates, gradients
from lowrank_lab.training.step import set_learning_rate, update_

STEPS = 7
RANKED = {"rank": 3, "update_proj_gap": 3}
RESTARTS = {"update_proj_gap": 3, "warmup": 2}
PER_LAYER = [name for name in QUICK if METHODS[name].per_layer]


def net(dtype=torch.float32):
    """Weights of many shapes; one of them is used twice and one never."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 8), "tall": nn.Linear(8, 12), "norm": nn.LayerNorm(12),
            "wide": nn.Linear(12, 8), "head": nn.Linear(8, 11, bias=False),
            "unused": nn.Linear(3, 3),
        }
    )  # fmt: skip
    model["head"].weight = model["embed"].weight
    return model.to(dtype)


def loss_of(model, seed):
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(seed))
    hidden = model["norm"](model["tall"](model["embed"](tokens)).tanh())
    hidden = model["wide"](model["norm"](model["tall"](model["wide"](hidden))))
    return nn.functional.cross_entropy(model["head"](hidden).flatten(0, 1), tokens.flatten())


def matrices_and_rest(model, **keys):
    return grouped(model, **RANKED, **keys)


def grouped(model, **keys):
    ranked = [model["tall"].weight, model["wide"].weight]
    others = [p for p in model.parameters() if all(p is not q for q in ranked)]
    return [{"params": ranked, **keys}, {"params": others}]


OPTIMIZERS = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "fused AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "GaLore": lambda m: GaLore(matrices_and_rest(m), lr=1e-2, weight_decay=0.1),
    "Fira": lambda m: Fira(matrices_and_rest(m), lr=1e-2, weight_decay=0.1),
    "Apollo": lambda m: Apollo(matrices_and_rest(m), lr=1e-2, weight_decay=0.1),
    "Spam": lambda m: Spam(
        m.parameters(), lr=1e-2, weight_decay=0.1, density=0.5, grad_accu_steps=1, **RESTARTS
    ),
    "Frugal": lambda m: Frugal(matrices_and_rest(m), lr=1e-2, weight_decay=0.1),
    "columns": lambda m: Frugal(matrices_and_rest(m, proj="columns"), lr=1e-2, weight_decay=0.1),
    "LDAdam": lambda m: LDAdam(grouped(m, rank=3, error_feedback=False), lr=1e-2),
    "Scale": lambda m: Scale(grouped(m, norm_dim=1, momentum=0.9), lr=1e-2),
    "NorMuon": lambda m: NorMuon(grouped(m, use_muon=True), lr=1e-2, weight_decay=0.1),
    "StableSpam": lambda m: StableSpam(m.parameters(), lr=1e-2, update_proj_gap=3),
}


def ordinary_steps(model, optimizer, steps=STEPS):
    """Weights after `steps` ordinary steps, and the global norm of the gradients of each."""
    norms = []
    for step in range(steps):
        loss_of(model, step).backward()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack(squares).sum().sqrt().item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def alive_watched(model, seen):
    """Note, whenever a gradient has just arrived, how many there are; call before PerLayer…"""

    def hook(parameter):
        assert parameter.grad is not None
        seen.append(sum(p.grad is not None for p in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)


def config_of(text_corpus, method, **values):
    options = short_options(method, 3) | per_layer_options(method)
    return RunConfig(
        **{
            **{"model": "tiny", "corpus": text_corpus, "vocab_size": "byte", "num_layers": 1},
            **{"sequence_length": 16, "batch": 4, "steps": 8, "eval_tokens": 64, "warmup": 0.2},
            **{"test_tokens": 64, "clip": 0.0, "recovery_steps": 2, "weight_decay": 0.1},
            **{"method": method, "method_options": options, "rank": METHODS[method].rank or 4},
            **values,
        }
    )


# The class


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_states_are_those_of_ordinary_steps(name, dtype):
    ours, theirs = net(dtype), net(dtype)
    optimizer, reference = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    PerLayerUpdates(ours, optimizer)
    for step in range(STEPS):
        loss_of(ours, step).backward()
    ordinary_steps(theirs, reference)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == reference.state[q].keys()
        for key, value in reference.state[q].items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_never_more_than_one_gradient_is_alive_and_none_after_backward(name):
    model, seen = net(), []
    alive_watched(model, seen)
    PerLayerUpdates(model, OPTIMIZERS[name](model))
    loss_of(model, 0).backward()
    used = [p for n, p in model.named_parameters() if not n.startswith("unused")]
    assert seen == [1] * len(used)
    assert all(p.grad is None for p in model.parameters())


def test_an_ordinary_backward_pass_holds_all_gradients_at_its_end():
    model, seen = net(), []
    alive_watched(model, seen)
    loss_of(model, 0).backward()
    assert seen == list(range(1, 8))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_the_norm_is_the_global_norm_of_each_backward_pass(dtype, tolerance):
    ours, theirs = net(dtype), net(dtype)
    updates = PerLayerUpdates(ours, torch.optim.AdamW(ours.parameters(), lr=1e-2))
    expected = ordinary_steps(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2))
    for step, norm in enumerate(expected):
        loss_of(ours, step).backward()
        found = updates.norm()
        assert (found.dtype, found.shape) == (torch.float32, ())
        assert found.item() == pytest.approx(norm, rel=tolerance)


def test_zero_gradients_have_norm_zero_and_keep_the_weights_finite():
    model = net()
    updates = PerLayerUpdates(model, OPTIMIZERS["GaLore"](model))
    for _ in range(4):
        (0 * loss_of(model, 0)).backward()
        assert updates.norm() == 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    model = net()
    updates = PerLayerUpdates(model, OPTIMIZERS["AdamW"](model))
    (loss_of(model, 0) * float("inf")).backward()
    assert not updates.norm().isfinite()


def test_frozen_weights_stay_and_have_no_gradient():
    model = net()
    model["tall"].requires_grad_(False)
    frozen = copy.deepcopy(model["tall"].state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    PerLayerUpdates(model, optimizer)
    before = model["wide"].weight.detach().clone()
    loss_of(model, 0).backward()
    assert all(torch.equal(v, frozen[k]) for k, v in model["tall"].state_dict().items())
    assert not torch.equal(model["wide"].weight, before)


# In runs


@pytest.mark.parametrize("method", PER_LAYER)
def test_every_method_trains_as_it_does_otherwise(text_corpus, method):
    layered, reference = {}, {}
    techniques = {"refactor_every": 2} if METHODS[method].has_products else {}
    for per_layer, found in ((False, reference), (True, layered)):
        config = resolve(config_of(text_corpus, method, per_layer=per_layer, **techniques))
        model, optimizer = build(config)
        updates = PerLayerUpdates(model, optimizer) if per_layer else None
        chance = torch.Generator().manual_seed(0)
        found["values"] = []
        for step in range(config.steps):
            tokens = torch.randint(257, (4, 17), generator=chance)
            set_learning_rate(optimizer, config, step)
            batches = [(tokens[:, :-1], tokens[:, 1:])]
            loss, norm = gradients(model, batches, config, updates)
            assert (not per_layer) or all(p.grad is None for p in model.parameters())
            found["values"].append(
                (loss.item(), norm.item(), update_(model, optimizer, config, step))
            )
        found["weights"] = model.state_dict()
    for ours, theirs in zip(layered["values"], reference["values"], strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-6)
        assert ours[2] == theirs[2]
    for name, W in reference["weights"].items():
        torch.testing.assert_close(layered["weights"][name], W, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", [{}, {"activation_checkpointing": True}])
def test_a_run_has_the_losses_and_norms_of_an_ordinary_run(text_corpus, tmp_path, change):
    train(config_of(text_corpus, "galore"), tmp_path / "0")
    train(config_of(text_corpus, "galore", per_layer=True, **change), tmp_path / "1")
    runs = load_runs(tmp_path)
    for column in ("loss", "grad_norm"):
        whole, layered = (runs.loc[runs["run"] == name, column].tolist() for name in "01")
        assert layered == pytest.approx(whole, rel=1e-5)


def test_a_run_says_that_it_holds_the_gradient_of_one_weight(text_corpus, tmp_path):
    config = config_of(text_corpus, "galore", per_layer=True)
    run = train(config, tmp_path / "run")
    largest = max(p.numel() for p in build(run.config)[0].parameters())
    assert set(run.metrics["gradient_bytes"]) == {4 * largest}
    assert run.memory["gradients"] == 4 * largest


def test_a_run_with_per_layer_updates_goes_on_after_an_interruption(text_corpus, tmp_path):
    config = config_of(text_corpus, "fira", per_layer=True, checkpoint_every=3)
    whole = train(config, tmp_path / "whole")

    def stop(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", on_step=stop)
    cut = train(config, tmp_path / "cut")
    assert cut.metrics["loss"].tolist() == whole.metrics["loss"].tolist()
    assert cut.metrics["grad_norm"].tolist() == whole.metrics["grad_norm"].tolist()


# What can't go together with it


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("full-rank", {"clip": 1.0}, r"^clip: 1\.0 is not allowed; with per_layer .*; 0$"),
        (
            "galore",
            {"gradient_accumulation": 2},
            r"^gradient_accumulation: 2 is not allowed; with per_layer .*; 1$",
        ),
        ("loro", {}, r"^per_layer: True is not allowed; loro updates its factors in pairs$"),
        (
            "relora",
            {"method_options": {"warm_start": 2}},
            r"^per_layer: True is not allowed; .* warm start",
        ),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(text_corpus, method, values, said):
    with pytest.raises(InputError, match=said) as caught:
        resolve(config_of(text_corpus, method, per_layer=True, **values))
    assert "\n" not in str(caught.value)


def test_the_same_is_allowed_without_per_layer_updates(text_corpus):
    for values in ({"clip": 1.0}, {"gradient_accumulation": 2}):
        assert not resolve(config_of(text_corpus, "galore", **values)).per_layer
    assert resolve(config_of(text_corpus, "relora", per_layer=True)).per_layer


def test_the_default_clipping_is_refused_too():
    with pytest.raises(InputError, match=r"^clip: 1\.0 is not allowed"):
        resolve(RunConfig(model="tiny", corpus="markov", per_layer=True))
