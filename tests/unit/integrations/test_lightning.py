"""The callback in a real Lightning Trainer: the weights of a plain loop, and exact on resume."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from lowrank_lab import factorize, optim, refactorize_, reset_momentum_
from lowrank_lab.integrations.lightning import TechniquesCallback
from lowrank_lab.layers import lora_layers, merge_
from lowrank_lab.techniques import RecoveryLR

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
STEPS, BATCH, RECOVERY = 12, 4, 2
ALL = {"refactor_every": 3, "reset_every": 4, "on_refactor": "transport"}
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "GaLore": lambda p: optim.GaLore(p, lr=1e-2),
}


class Net(LightningModule):
    """Two factorised layers with their optimizer and its recovering scheduler."""

    def __init__(self, optimizer="AdamW", kind="low-rank", interval="step"):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(9, 12, bias=False), nn.Tanh(), nn.Linear(12, 5, bias=False)
        self.net = factorize(nn.Sequential(*layers), kind, rank=3, target=".")
        self.optimizer, self.interval = optimizer, interval
        self.seen = []

    def training_step(self, batch, index):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def parts(self):
        optimizer = OPTIMIZERS[self.optimizer]([p for p in self.parameters() if p.requires_grad])
        schedule = OneCycleLR(optimizer, 0.02, total_steps=STEPS, cycle_momentum=False)
        return optimizer, RecoveryLR(schedule, RECOVERY)

    def configure_optimizers(self):
        optimizer, scheduler = self.parts()
        config = {"scheduler": scheduler, "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_train_batch_end(self, *arguments):
        self.seen.append(self.trainer.global_step)


def data(size=BATCH):
    chance = torch.Generator().manual_seed(1)
    X, Y = (torch.randn(STEPS * BATCH, n, generator=chance) for n in (9, 5))
    rows = torch.utils.data.TensorDataset(X, Y)
    return torch.utils.data.DataLoader(rows, batch_size=size)


def fit(model, folder, *callbacks, pieces=1, resume=None, options=ALL):
    with warnings.catch_warnings(action="ignore"):
        trainer = Trainer(
            accelerator="cpu", max_steps=STEPS, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, accumulate_grad_batches=pieces,
            enable_checkpointing=bool(callbacks),
            callbacks=[TechniquesCallback(**options), *callbacks],
        )  # fmt: skip
        trainer.fit(model, data(BATCH // pieces), ckpt_path=resume)
    return model


def plain_loop(model, events):
    """The same training and the same calls, without a Trainer."""
    optimizer, scheduler = model.parts()
    for step, batch in enumerate(data(), 1):
        optimizer.zero_grad()
        model.training_step(batch, step).backward()
        optimizer.step()
        if step < STEPS:
            scheduler.step()
            events(step, optimizer, scheduler)
    return model


def same(ours, theirs):
    return all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_trainer_with_the_callback_has_the_weights_of_a_plain_loop(name, tmp_path):
    model, other = fit(Net(name), tmp_path), Net(name)

    def events(step, optimizer, scheduler):
        if step % 3 == 0:
            refactorize_(other, optimizer, "transport")
        if step % 4 == 0:
            reset_momentum_(optimizer)
            scheduler.reset()

    plain_loop(other, events)
    assert same(model, other)
    assert not same(model, plain_loop(Net(name), lambda *parts: None))


def test_merges_are_those_of_a_plain_loop(tmp_path):
    model = fit(Net(kind="lora"), tmp_path, options={"merge_every": 5, "seed": 2})
    other = Net(kind="lora")

    def events(step, optimizer, scheduler):
        if step % 5 == 0:
            merge_(other, 2 * 1_000_003 + step)
            factors = [f for _, layer in lora_layers(other) for f in layer.factors()]
            reset_momentum_(optimizer, params=factors)
            scheduler.reset()

    assert same(model, plain_loop(other, events))


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    whole, pieces = fit(Net(), tmp_path), fit(Net(), tmp_path, pieces=2)
    assert pieces.seen == [step // 2 for step in range(1, 2 * STEPS + 1)]
    for p, q in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


class ByStep(Net):
    """Reads the batch of each step itself: Lightning begins an epoch again when it resumes."""

    def training_step(self, batch, index):
        return super().training_step(list(data())[self.trainer.global_step], index)


@pytest.mark.parametrize("cut", [3, 4, 5])  # at a refactorization, at a reset, in a recovery
def test_a_resumed_trainer_is_exact(cut, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=cut, save_top_k=-1, filename="{step}")
    whole = fit(ByStep(), tmp_path, keep)
    resumed = fit(ByStep(), tmp_path, resume=tmp_path / f"step={cut}.ckpt")
    assert same(whole, resumed)
    assert resumed.seen == list(range(cut + 1, STEPS + 1))


def test_what_the_techniques_cannot_change_is_refused_when_training_begins(tmp_path):
    with pytest.raises(ValueError, match=r"^interval: 'epoch', frequency 1 is not allowed; 'step'"):
        fit(Net(interval="epoch"), tmp_path)

    class Bare(Net):
        def configure_optimizers(self):
            return self.parts()[0]

    with pytest.raises(ValueError, match=r"^lr_scheduler: NoneType is not allowed; wrap it in"):
        fit(Bare(), tmp_path)
    fit(Bare(), tmp_path, options={**ALL, "recovery": False})

    class Two(Net):
        def configure_optimizers(self):
            return [self.parts()[0], self.parts()[0]], []

    two = Two()
    two.automatic_optimization = False
    with pytest.raises(ValueError, match=r"^optimizers: 2 is not allowed; exactly one$"):
        fit(two, tmp_path)
