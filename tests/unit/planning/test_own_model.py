"""`simulate_memory(model=…)`: a model of one's own on fake tensors, against real steps."""

import copy

import pytest
import torch
import transformers
from torch import nn

import lowrank_lab as lab
from lowrank_lab.memory.breakdown import persistent
from lowrank_lab.planning.simulate import allocator_peak


def llama(device="cpu"):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=96, max_position_embeddings=32,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config)


def tokens(sequences=2):
    ids = torch.randint(96, (sequences, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), fused=True)


def galore(model):
    of_layers = [p for name, p in model.named_parameters() if "proj" in name]
    rest = [p for name, p in model.named_parameters() if "proj" not in name]
    return lab.optim.GaLore(
        [{"params": of_layers, "rank": 4, "update_proj_gap": 3}, {"params": rest}]
    )


both = pytest.mark.parametrize("build", [adamw, galore])


def step(model, optimizer, batch):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@both
def test_the_peak_and_what_persists_are_those_of_real_steps(build):
    model = llama()
    report = lab.simulate_memory(model=model, optimizer=build, batch=tokens())
    optimizer = build(model)
    step(model, optimizer, tokens())
    kept = persistent(model, optimizer)
    assert report.persistent.weights == kept.weights
    assert report.persistent.optimizer_states == kept.optimizer_states
    with allocator_peak(torch.device("cpu")) as above:
        step(model, optimizer, tokens())
    measured = kept.weights + kept.optimizer_states + above[0]
    assert report.steps["next"].peak.total == pytest.approx(measured, rel=0.02)


@both
def test_a_function_an_optimizer_and_the_meta_device_give_the_same(build):
    model = llama()
    expected = lab.simulate_memory(model=model, optimizer=build, batch=tokens())
    of_instance = lab.simulate_memory(model=model, optimizer=build(model), batch=tokens())
    on_meta = lab.simulate_memory(model=llama("meta"), optimizer=build, batch=tokens())
    for report in (of_instance, on_meta):
        assert report.peak == expected.peak
        assert report.persistent == expected.persistent


def test_model_and_optimizer_are_not_changed_not_even_one_in_training():
    model = llama().eval()
    optimizer = adamw(model)
    step(model, optimizer, tokens())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    report = lab.simulate_memory(model=model, optimizer=optimizer, batch=tokens())
    assert set(report.steps) == {"first", "next"}
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert str(before) == str((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.NAdam])
def test_an_optimizer_in_training_whose_step_count_is_read_can_be_asked_about(build):
    model = nn.Linear(20, 20)
    optimizer = build(model.parameters())
    model(torch.randn(2, 20)).sum().backward()
    optimizer.step()
    found = lab.simulate_memory(model=model, optimizer=optimizer, batch=torch.randn(2, 20))
    new = lab.simulate_memory(
        model=model, optimizer=lambda m: build(m.parameters()), batch=torch.randn(2, 20)
    )
    assert found.steps["next"].peak == new.steps["next"].peak


def test_each_kind_of_refresh_is_a_step_of_its_own():
    steps = lab.simulate_memory(model=llama(), optimizer=galore, batch=tokens()).steps
    assert list(steps) == ["first", "next", "refresh (update_proj_gap 3)"]


def test_a_larger_batch_takes_more_activations_and_nothing_else():
    small, large = (
        lab.simulate_memory(model=llama(), optimizer=adamw, batch=tokens(n)) for n in (1, 8)
    )
    assert small.persistent == large.persistent
    kept = [report.steps["next"].kept.activations for report in (small, large)]
    assert kept[1] > 4 * kept[0]


def test_ties_count_once_and_frozen_weights_have_no_states():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    report = lab.simulate_memory(model=model, optimizer=adamw, batch=torch.randn(4, 8))
    assert report.persistent.weights == 8 * 8 * 4
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    lab.factorize(model, "lora", rank=2, target="0")
    report = lab.simulate_memory(model=model, optimizer=adamw, batch=torch.randn(4, 8))
    assert report.persistent.frozen == 8 * 8 * 4
    assert report.persistent.optimizer_states == 2 * (2 * 8 * 2 * 4) + 2 * 4  # m, v and step counts


def test_cuda_rounds_blocks_up():
    on = {
        device: lab.simulate_memory(device=device, model=llama(), optimizer=adamw, batch=tokens())
        for device in ("cpu", "cuda")
    }
    assert on["cuda"].persistent == on["cpu"].persistent
    assert on["cuda"].peak.weights % 512 == 0
    assert on["cuda"].excluded


def test_what_a_simulation_of_an_lstm_leaves_out_is_said():
    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    report = lab.simulate_memory(model=Last(4, 4), optimizer=adamw, batch=torch.randn(2, 3, 4))
    assert any("LSTM" in what for what in report.excluded)


def reads_values(model, batch):
    return model(batch).sum() * (2 if batch.sum() > 0 else 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": None}, "optimizer: None"),
        ({"batch": None}, "batch: None"),
        ({"config": lab.RunConfig()}, "config: either"),
        ({"model": None}, "config: either"),
        ({"world_size": 2}, "world_size: 2"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"optimizer": lambda model: None}, "optimizer: NoneType"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "optimizer: it has param"),
        ({"loss": reads_values}, "model: it reads values"),
        ({"model": nn.LSTM(4, 4), "batch": torch.randn(2, 1, 4)}, "loss: None"),
    ],
)
def test_what_can_not_be_simulated_is_refused_in_one_line(change, message):
    keys = {"model": nn.Linear(4, 4), "optimizer": adamw, "batch": torch.randn(2, 4)}
    with pytest.raises(ValueError, match=message) as refused:
        lab.simulate_memory(**(keys | change))
    assert "\n" not in str(refused.value)
