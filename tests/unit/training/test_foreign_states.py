"""Optimizers that evaluate other weights than they train, or count outside their states."""

import re
import warnings

import pytest
import pytorch_optimizer
import torch
from safetensors.torch import load_file
from torch import nn

from lowrank_lab import InputError, RunConfig, TrainingError, optim, train
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim import Combined
from lowrank_lab.training.evaluate import evaluation_weights
from lowrank_lab.training.outside import OutsideState

FREE = "pytorch_optimizer.ScheduleFreeAdamW"


@pytest.fixture
def config(text_corpus):
    """Makes a tiny run."""

    def make(optimizer, **values):
        return RunConfig(**{
            "model": "tiny", "num_layers": 1, "corpus": text_corpus, "vocab_size": "byte",
            "sequence_length": 16, "batch": 2, "steps": 8, "eval_tokens": 64, "test_tokens": 64,
            "optimizer": optimizer, "lr": 3e-3, "schedule": "constant", **values,
        })  # fmt: skip

    return make


def interrupted(config, folder, step=5):
    """A run that is stopped after a step, and what resuming it warns of."""

    def stop(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, folder, on_step=stop)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(config, folder)
    return run, [str(w.message) for w in caught if "starts again" in str(w.message)
                 or "outside" in str(w.message)]  # fmt: skip


def losses(run):
    return run.metrics["loss"].tolist()


@pytest.fixture
def seen(monkeypatch):
    """Weights with which each loss on held-out text was computed."""
    from lowrank_lab.training import trainer

    found, real = [], trainer.evaluate

    def noting(model, *arguments, **options):
        found.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return real(model, *arguments, **options)

    monkeypatch.setattr(trainer, "evaluate", noting)
    return found


def test_a_schedule_free_run_evaluates_and_saves_the_averaged_weights(config, tmp_path, seen):
    run = train(config(FREE, checkpoint_every=8, keep_after_finish=True), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in seen[-1].items())
    # The checkpoint has the training weights y and z: x = y + (1 − 1 / β₁)(z − y).
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    kept = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    for name, weight in saved.items():
        y, z = kept[f"model/{name}"], kept[f"optimizer/{name}/z"]
        torch.testing.assert_close(weight, y + (1 - 1 / 0.9) * (z - y))
    assert any(not torch.equal(saved[name], kept[f"model/{name}"]) for name in saved)
    loss = run.metrics["validation_loss"].dropna().iloc[-1]
    assert run.result["validation_loss"] == pytest.approx(loss)


def test_evaluations_do_not_change_a_schedule_free_run(config, tmp_path):
    often = train(config(FREE, eval_every=1, spectra_every=1), tmp_path / "often")
    once = train(config(FREE, eval_every=8, spectra_every=8), tmp_path / "once")
    assert losses(often) == losses(once)


def test_a_schedule_free_run_resumes_exactly(config, tmp_path):
    values = {"checkpoint_every": 3, "eval_every": 2, "reset_every": 4, "reset_params": "all"}
    run = config(FREE, recovery_steps=2, **values)
    whole = train(run, tmp_path / "whole")
    cut, said = interrupted(run, tmp_path / "cut")
    assert (losses(cut), said) == (losses(whole), [])
    assert cut.result["test_loss"] == whole.result["test_loss"]


@pytest.mark.parametrize("combine", [False, True])
def test_training_weights_come_back_bit_by_bit(combine):
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    optimizer = pytorch_optimizer.ScheduleFreeAdamW(model.parameters(), lr=0.1)
    optimizer = Combined(optimizer) if combine else optimizer
    for _ in range(3):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with evaluation_weights(model, optimizer):
        assert not any(map(torch.equal, model.parameters(), before))
    assert all(map(torch.equal, model.parameters(), before))
    assert all(group["train_mode"] for group in optimizer.param_groups)
    sgd = torch.optim.SGD(model.parameters())
    with evaluation_weights(model, sgd):
        assert all(map(torch.equal, model.parameters(), before))


# Can't step before `train()`, as some schedule-free optimizers.
STRICT = """
import torch

class Strict(torch.optim.SGD):
    training = False

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def step(self, closure=None):
        assert self.training
        return super().step(closure)
"""


def test_an_optimizer_that_wants_train_to_be_called_first_is_trained(config, tmp_path, monkeypatch):
    (tmp_path / "strict.py").write_text(STRICT)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(losses(train(config("strict.Strict"), tmp_path / "run"))) == 8


EXACT = ("Ranger21", "DAdaptAdam", "Prodigy", "SOAP", "AdEMAMix")


@pytest.mark.parametrize("name", [*EXACT, "AggMo", "AdaShift"])
def test_numbers_outside_the_states_are_kept_and_a_run_resumes_exactly(config, tmp_path, name):
    options = {"num_iterations": 8} if name == "Ranger21" else {}
    run = config(f"pytorch_optimizer.{name}", optimizer_options=options, checkpoint_every=3)
    whole = train(run, tmp_path / "whole")
    cut, said = interrupted(run, tmp_path / "cut")
    assert (losses(cut), said) == (losses(whole), [])


class Hidden(torch.optim.SGD):
    """Averages gradients and counts where no state_dict looks."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.average, self.count, self.best = None, 0, {"loss": None}

    @torch.no_grad()
    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.average, self.count = torch.stack([g.sum() for g in grads]).mean(), self.count + 1
        super().step(closure)


def test_tensors_outside_the_states_are_named_in_one_line_and_numbers_are_restored():
    def made():
        weight = nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        optimizer = Hidden([weight])
        return optimizer, OutsideState(optimizer)

    optimizer, outside = made()
    assert outside.changed() == {"values": {}, "lost": []}
    optimizer.step()
    kept = outside.changed()
    assert kept == {"values": {"0.count": 1}, "lost": ["0.average"]}
    other, said = made(), []
    other[1].restore_(kept, said.append)
    assert other[0].count == 1
    assert said == ["Hidden keeps average outside its state_dict; training goes on without it"]
    for plain in (torch.optim.AdamW, torch.optim.LBFGS, torch.optim.NAdam):
        weight = nn.Parameter(torch.ones(2))
        optimizer = plain([weight])
        outside = OutsideState(optimizer)
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        weight.grad = torch.ones(2)
        optimizer.step(lambda: 0.0)
        assert outside.changed()["lost"] == []


def test_what_cannot_evaluate_its_averaged_weights_is_refused(config, monkeypatch):
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=re.escape("ScheduleFreeAdamW evaluates other weights")):
        resolve(config(FREE, parallel="fsdp2"))
    assert build(resolve(config(FREE)))


SPOILING = """
import torch

class Spoiling(torch.optim.AdamW):
    def step(self, closure=None):
        super().step(closure)
        if any(float(state["step"]) == 4 for state in self.state.values()):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.view(-1)[0] = float("nan")
"""


def test_a_run_whose_factors_are_no_longer_finite_stops_with_a_line(config, tmp_path, monkeypatch):
    (tmp_path / "spoiling.py").write_text(SPOILING)
    monkeypatch.syspath_prepend(tmp_path)
    values = {"method": "low-rank", "rank": 4, "refactor_every": 4, "checkpoint_every": 2}
    said = r"^after step 4: module: '.*q_proj' is not allowed; its factors are not finite; the last"
    with pytest.raises(TrainingError, match=said):
        train(config("spoiling.Spoiling", **values), tmp_path / "run")
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert kept == ["step-00000002"]


OURS = ("Apollo", "Fira", "GaLore", "GoLore", "Loro")


@pytest.mark.parametrize("name", OURS)
def test_optimizers_of_this_package_have_nothing_outside_their_states(name):
    factors = [nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3, 6))]
    optimizer = getattr(optim, name)([{"params": factors, "rank": 3}], lr=0.1)
    outside = OutsideState(optimizer)
    for _ in range(3):
        for p in factors:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert outside.changed() == {"values": {}, "lost": []}
