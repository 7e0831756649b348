"""The callback in a real Trainer: the weights of a plain loop, and exact after a resume."""

import builtins
import importlib
import sys

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowrank_lab import factorize, optim, refactorize_, reset_momentum_
from lowrank_lab.integrations.transformers import TechniquesCallback
from lowrank_lab.layers import lora_layers, merge_
from lowrank_lab.techniques import Periodic, RecoveryLR

STEPS, BATCH, LENGTH, RECOVERY = 10, 4, 12, 2
TARGET = r"_proj$"


def llama(kind="low-rank"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return factorize(LlamaForCausalLM(config), kind, rank=3, target=TARGET)


def dataset():
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (STEPS * BATCH * 2, LENGTH), generator=chance)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "GaLore": lambda p: optim.GaLore(p, lr=1e-2),
}
ALL = {"refactor_every": 3, "reset_every": 4, "on_refactor": "transport"}


def built(optimizer="AdamW", kind="low-rank"):
    model = llama(kind)
    made = OPTIMIZERS[optimizer](trainable(model))
    return model, made, RecoveryLR(CosineAnnealingLR(made, T_max=STEPS), RECOVERY)


def trainer(folder, model, optimizer, scheduler, callback, pieces=1, **more):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH // pieces,
        gradient_accumulation_steps=pieces, report_to="none", use_cpu=True, max_grad_norm=0.0,
        disable_tqdm=True, logging_strategy="no", save_strategy="no", **more,
    )  # fmt: skip

    class InOrder(Trainer):
        """Reads the data in order, so that a plain loop can."""

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder(
        model, arguments, train_dataset=dataset(), optimizers=(optimizer, scheduler),
        callbacks=[callback],
    )  # fmt: skip


def plain_loop(model, optimizer, scheduler, events):
    """The same training and the same calls, without a Trainer."""
    rows = dataset()
    model.train()
    for step in range(1, STEPS + 1):
        batch = torch.stack([row["input_ids"] for row in rows[(step - 1) * BATCH : step * BATCH]])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        scheduler.step()
        events(step)


def same(ours, theirs):
    return all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_trainer_with_the_callback_has_the_weights_of_a_plain_loop(name, tmp_path):
    model, optimizer, scheduler = built(name)
    trainer(tmp_path, model, optimizer, scheduler, TechniquesCallback(**ALL)).train()
    other, of_other, its_scheduler = built(name)

    def events(step):
        if step % 3 == 0 and step < STEPS:
            refactorize_(other, of_other, "transport")
        if step % 4 == 0 and step < STEPS:
            reset_momentum_(of_other)
            its_scheduler.reset()

    plain_loop(other, of_other, its_scheduler, events)
    assert same(model, other)
    without, of_without, last = built(name)
    plain_loop(without, of_without, last, lambda step: None)
    assert not same(model, without)


def test_merges_are_those_of_a_plain_loop(tmp_path):
    model, optimizer, scheduler = built(kind="lora")
    callback = TechniquesCallback(merge_every=4, seed=3)
    trainer(tmp_path, model, optimizer, scheduler, callback).train()
    other, of_other, its_scheduler = built(kind="lora")

    def events(step):
        if step % 4 == 0:
            merge_(other, 3 * 1_000_003 + step)
            factors = [f for _, layer in lora_layers(other) for f in layer.factors()]
            reset_momentum_(of_other, params=factors)
            its_scheduler.reset()

    plain_loop(other, of_other, its_scheduler, events)
    assert same(model, other)


def test_a_loop_of_accelerate_has_the_weights_of_a_plain_loop():
    model, *parts = built()
    accelerator, periodic = Accelerator(cpu=True), Periodic(**ALL)
    optimizer, scheduler = accelerator.prepare(*parts)
    periodic.check(model, optimizer, scheduler)
    plain_loop(
        model, optimizer, scheduler,
        lambda step: step < STEPS and periodic.apply_(model, optimizer, scheduler, step),
    )  # fmt: skip
    other, *its = built()
    plain_loop(other, *its, lambda step: step < STEPS and periodic.apply_(other, *its, step))
    assert same(model, other)
    assert parts[1].state_dict() == its[1].state_dict()


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    seen = []

    class Noting(TechniquesCallback):
        def on_step_end(self, args, state, control, **others):
            seen.append((state.global_step, self.periodic.due(state.global_step)))
            super().on_step_end(args, state, control, **others)

    whole, pieces = built(), built()
    trainer(tmp_path, *whole, Noting(**ALL)).train()
    once = list(seen)
    seen.clear()
    trainer(tmp_path, *pieces, Noting(**ALL), pieces=2).train()
    assert seen == once
    assert [step for step, _ in seen] == list(range(1, STEPS + 1))
    for p, q in zip(whole[0].parameters(), pieces[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("cut", [4, 5])  # at a reset, and in its recovery
def test_a_resumed_trainer_is_exact(cut, tmp_path):
    whole, first, resumed = built(), built(), built()
    trainer(tmp_path / "whole", *whole, TechniquesCallback(**ALL)).train()
    saving = trainer(tmp_path / "cut", *first, TechniquesCallback(**ALL))
    saving.args.save_strategy, saving.args.save_steps = "steps", cut
    saving.train()
    going_on = trainer(tmp_path / "cut", *resumed, TechniquesCallback(**ALL))
    going_on.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{cut}"))
    assert same(whole[0], resumed[0])
    assert resumed[2].state_dict() == whole[2].state_dict()


def test_what_the_techniques_cannot_change_is_refused_when_training_begins(tmp_path):
    model, optimizer, scheduler = built()
    unknown = type("Unknown", (torch.optim.SGD,), {"step": lambda self, closure=None: None})
    cases = {
        r"^lr_scheduler: CosineAnnealingLR .* wrap it in": (
            model, optimizer, CosineAnnealingLR(optimizer, 3),
        ),
        r"^optimizer: Unknown is not allowed; ": (
            model, unknown(trainable(model), lr=0.1), scheduler,
        ),
        r"^model: it has no factorised layers": (
            torch.nn.Linear(2, 2), optimizer, scheduler,
        ),
    }  # fmt: skip
    for said, parts in cases.items():
        with pytest.raises(ValueError, match=said):
            trainer(tmp_path, *parts, TechniquesCallback(**ALL)).train()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "refactor_every, reset_every, merge_every: 0 is not allowed"),
        ({"reset_every": -1}, "reset_every: -1 is not allowed; a whole number"),
        ({"reset_every": 2.5}, "reset_every: 2.5 is not allowed; a whole number"),
        ({"reset_every": 2, "reset_params": "some"}, "reset_params: 'some' is not allowed"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TechniquesCallback(**options)


@pytest.mark.parametrize("package", ["transformers", "lightning"])
def test_a_missing_package_is_one_line(package, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **keys):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **keys)

    module = f"lowrank_lab.integrations.{package}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ImportError, match=f"^{package}: it is not installed; pip install {package}$"
    ):
        importlib.import_module(module)
