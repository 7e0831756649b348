"""A method or an optimizer of one's own trains, is listed and is drawn like any other."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from lowrank_lab import InputError, RunConfig, figures, load_runs, simulate_memory, train
from lowrank_lab.cli import main
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.build import build, partition
from lowrank_lab.methods.optimizers import adamw
from lowrank_lab.methods.own import register_method
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.run import final_table
from lowrank_lab.training.gradients import gradients
from lowrank_lab.training.step import set_learning_rate, update_

STEPS = 16


class Signs(torch.optim.Optimizer):
    """p ← p − lr · strength · sign(momentum), the momentum an average of gradients."""

    def __init__(self, params, lr, strength):
        super().__init__(params, {"lr": lr, "strength": strength})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 0.5)
                p.sub_(m.sign(), alpha=group["lr"] * group["strength"])


def signs(targets, rest, config):
    strength = config.method_options["strength"]
    groups = [{"params": targets}, {"params": rest, "strength": 0.5 * strength}]
    return Signs(groups, config.lr, strength)


DEFAULTS = {"strength": 1.0, "every": 3, "shiny": True, "kind": "plain"}


@pytest.fixture
def mine():
    """The method `mine`, taken off again at the end, whatever was registered."""
    before = dict(METHODS)
    yield register_method("mine", optimizer=signs, lr=3e-3, defaults=DEFAULTS, summary="signs")
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def config(text_corpus):
    """Makes a tiny run."""

    def make(method="full-rank", **values):
        return RunConfig(
            **{
                **{"model": "tiny", "corpus": text_corpus, "vocab_size": "byte", "num_layers": 1},
                **{"sequence_length": 16, "batch": 4, "steps": STEPS, "method": method},
                **{"eval_tokens": 64, "test_tokens": 64, "recovery_steps": 2, **values},
            }
        )

    return make


def assert_refused(call, field, *said):
    """One line that names the field and says all of this."""
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in said), str(caught.value)


# A method of one's own


def test_an_own_method_trains_and_is_in_the_tables_and_figures(mine, config, tmp_path):
    run = train(config("mine", steps=40), tmp_path / "mine")
    train(config("full-rank"), tmp_path / "full-rank")
    loss = run.metrics["loss"]
    assert loss.iloc[-4:].mean() < 0.8 * loss.iloc[:4].mean()
    runs = load_runs(tmp_path)
    assert set(runs["method"]) == set(runs["label"]) == {"mine", "full-rank"}
    finals = final_table(runs)
    texts = [t.get_text() for ax in figures.tradeoff(finals).axes for t in ax.texts]
    assert set(figures.tradeoff_table(finals)["label"]) == {"mine", "full-rank"}
    assert any(text.strip().startswith("mine") for text in texts)
    weights = finals.set_index("label")
    assert weights.at["mine", "optimizer_state_bytes"] == weights.at["mine", "weight_bytes"]


def test_an_own_method_trains_the_targets_and_the_rest_as_it_says(mine, config):
    resolved = resolve(config("mine", clip=0.0))
    model, optimizer = build(resolved)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tokens = torch.arange(68).view(4, 17)
    set_learning_rate(optimizer, resolved, 9)
    gradients(model, [(tokens[:, :-1], tokens[:, 1:])], resolved)
    rate = optimizer.param_groups[0]["lr"]
    moves = {n: p.grad.sign() for n, p in model.named_parameters()}
    update_(model, optimizer, resolved, 9)
    for name, p in model.named_parameters():
        strength = 1.0 if "_proj" in name else 0.5
        torch.testing.assert_close(p, before[name] - rate * strength * moves[name])


def test_an_own_method_is_listed_with_its_options(mine):
    done = CliRunner().invoke(main, ["methods", "--json"])
    row = next(row for row in json.loads(done.stdout) if row["name"] == "mine")
    assert (row["summary"], row["layers"], row["lr"]) == ("signs", "dense", 3e-3)
    assert {name: row["options"][name] for name in DEFAULTS} == DEFAULTS
    assert "mine" in CliRunner().invoke(main, ["methods"]).stdout
    assert "strength 1.0" in CliRunner().invoke(main, ["methods", "mine"]).stdout


def test_an_own_method_is_trained_from_the_command_line(mine, text_corpus, tmp_path):
    arguments = ["train", "--model", "tiny", "--corpus", text_corpus, "--vocab-size", "byte"]
    arguments += ["--sequence-length", "16", "--batch", "2", "--steps", "3", "--method", "mine"]
    arguments += ["--eval-tokens", "64", "--test-tokens", "64", "--option", "strength=0.25"]
    done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert stored["method_options"]["strength"] == 0.25


def test_its_defaults_are_options_of_the_run(mine, config):
    options = resolve(config("mine", method_options={"strength": 2, "every": 5})).method_options
    found = {name: options[name] for name in DEFAULTS}
    assert found == {"strength": 2.0, "every": 5, "shiny": True, "kind": "plain"}
    assert isinstance(options["strength"], float)
    assert resolve(config("mine")).run_id != resolve(config("mine", method_options=options)).run_id


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("strength", "much", "a number"),
        ("strength", True, "a number"),
        ("strength", float("nan"), "a number"),
        ("every", 2.5, "a whole number"),
        ("every", True, "a whole number"),
        ("shiny", 1, "true or false"),
        ("kind", 3, "'plain'"),
    ],
)
def test_its_options_keep_their_kind(mine, config, name, value, said):
    call = lambda: resolve(config("mine", method_options={name: value}))  # noqa: E731
    assert_refused(call, f"method_options.{name}", said)


def test_an_option_it_does_not_have_is_refused_with_the_nearest(mine, config):
    call = lambda: resolve(config("mine", method_options={"strenght": 1.0}))  # noqa: E731
    assert_refused(call, "method_options", "mine has no such option", "strength")


@pytest.mark.parametrize("layers", ["low-rank", "lora", "sltrain"])
def test_an_own_method_may_train_factors_with_adamw(mine, config, tmp_path, layers):
    register_method("factors", layers=layers, defaults={"alpha": 8.0})
    run = train(config("factors", rank=4, refactor_every=5, steps=40), tmp_path / "run")
    loss = run.metrics["loss"]
    assert loss.iloc[-4:].mean() < 0.8 * loss.iloc[:4].mean()
    assert run.config.method_options["alpha"] == 8.0
    assert [e["event"] for e in run.metrics["events"][9]] == ["refactor"]


def test_an_own_method_may_bring_a_formula_for_its_states_and_a_colour(mine, config):
    with pytest.raises(InputError, match="no formula for its states"):
        by_formula(resolve(config("mine")))
    register_method(
        "mine", optimizer=signs, defaults=DEFAULTS, colour="#123abc",
        state_bytes=lambda w, config: w.nbytes,
    )  # fmt: skip
    counted = by_formula(resolve(config("mine")))
    assert counted.optimizer_states == counted.weights
    assert simulate_memory(config("mine")).persistent.optimizer_states == counted.weights
    assert figures.style_of("mine", ["full-rank", "mine"])[0] == "#123abc"


@pytest.mark.parametrize("colour", ["red", "#12", "#12345g", ""])
def test_a_colour_that_is_no_hexadecimal_one_is_refused(mine, colour):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=r"^colour: .* is not allowed; #RRGGBB$"):
        register_method("mine", optimizer=signs, colour=colour)
    assert before == METHODS


def test_registering_again_replaces_the_method(mine, config):
    register_method("mine", lr=0.5)
    resolved = resolve(config("mine"))
    assert resolved.lr == 0.5
    assert type(build(resolved)[1]) is torch.optim.AdamW
    assert "strength" not in resolved.method_options


def test_runs_can_be_read_where_the_method_is_not_registered(mine, config, tmp_path):
    train(config("mine"), tmp_path / "run")
    del METHODS["mine"]
    assert set(load_runs(tmp_path)["method"]) == {"mine"}
    assert_refused(lambda: resolve(config("mine")), "method", "mine")


@pytest.mark.parametrize("name", ["", "my method", "../mine", "a/b", "mine\n", "mine=1"])
def test_a_name_that_is_no_word_is_refused(mine, name):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=r"^name: .* is not allowed; letters, digits, - and _$"):
        register_method(name, optimizer=signs)
    assert before == METHODS


@pytest.mark.parametrize(
    ("layers", "said"), [("lowrank", "did you mean 'low-rank'"), ("", "known: ")]
)
def test_an_unknown_kind_of_layer_is_refused(mine, layers, said):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=rf"^layers: '{layers}' is not allowed; {said}"):
        register_method("other", layers=layers)
    assert before == METHODS


def test_an_own_optimizer_and_a_named_one_do_not_go_together(mine, config):
    call = lambda: resolve(config("mine", optimizer="torch.optim.NAdam"))  # noqa: E731
    assert_refused(call, "optimizer", "mine brings an optimizer of its own")


def test_a_reset_of_moments_that_are_not_there_is_refused(mine, config, tmp_path):
    call = lambda: train(config("mine", reset_every=4), tmp_path / "run")  # noqa: E731
    assert_refused(call, "reset_every")


# An optimizer by its import path


NAMED = [
    ("torch.optim.NAdam", {"betas": (0.9, 0.99), "momentum_decay": 0.01}),
    ("pytorch_optimizer.SOAP", {"precondition_frequency": 4}),
    ("torch.optim.SGD", {"momentum": 0.9}),
]


@pytest.mark.parametrize("method", ["full-rank", "low-rank"])
@pytest.mark.parametrize(("path", "options"), NAMED)
def test_an_optimizer_by_its_path_trains(config, tmp_path, path, options, method):
    rate = {"lr": {"SGD": 0.3, "SOAP": 1e-2}.get(path.rpartition(".")[2], 2.5e-3)}
    run = train(
        config(method, optimizer=path, optimizer_options=options, steps=40, **rate),
        tmp_path / "run",
    )
    loss = run.metrics["loss"]
    assert loss.iloc[-4:].mean() < 0.85 * loss.iloc[:4].mean()
    assert run.config.optimizer == path


@pytest.mark.parametrize(("path", "options"), NAMED)
def test_it_is_the_very_optimizer_with_these_options(config, path, options):
    resolved = resolve(config(optimizer=path, optimizer_options=options))
    optimizer = build(resolved)[1]
    assert f"{type(optimizer).__name__}" == path.rpartition(".")[2]
    for group in optimizer.param_groups:
        assert group["lr"] == resolved.lr
        assert {key: group[key] for key in options} == {
            k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
        }


@pytest.mark.parametrize(
    ("path", "options"), [("torch.optim.NAdam", {"betas": [0.9, 0.99]}), NAMED[1]]
)
def test_a_named_optimizer_goes_on_after_an_interruption(config, tmp_path, path, options):
    named = config(optimizer=path, optimizer_options=options, checkpoint_every=4)
    whole = train(named, tmp_path / "whole")

    def stop(row):
        if row["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(named, tmp_path / "cut", on_step=stop)
    assert train(named, tmp_path / "cut").metrics["loss"].tolist() == whole.metrics["loss"].tolist()


def test_torch_s_own_adam_may_be_reset(config):
    for path in ("torch.optim.Adam", "torch.optim.AdamW"):
        assert resolve(config(optimizer=path, reset_every=4)).reset_every == 4


@pytest.mark.parametrize(
    "path",
    [
        "NAdam", "", ".", "torch.optim.", ".NAdam", "torch.optim.Nadam", "nowhere.Adam",
        "torch.optim..NAdam", "torch.optim.adam:Adam",
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_refused(config, path):
    assert_refused(lambda: resolve(config(optimizer=path)), "optimizer", "can't be imported")


@pytest.mark.parametrize(
    "path",
    ["torch.nn.Linear", "torch.optim.lr_scheduler.LambdaLR", "math.pi", "torch.relu", "os.path"],
)
def test_a_path_to_something_else_is_refused(config, path):
    call = lambda: resolve(config(optimizer=path))  # noqa: E731
    assert_refused(call, "optimizer", "must name a class of torch.optim.Optimizer")


def test_a_module_that_fails_when_imported_is_refused(config, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    call = lambda: resolve(config(optimizer="broken_module.Adam"))  # noqa: E731
    assert_refused(call, "optimizer", "can't be imported")
    assert "broken_module" not in sys.modules


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("torch.optim.NAdam", {"momentum_dcay": 0.1}),
        ("torch.optim.NAdam", {"betas": [0.9, 2.0]}),
        ("torch.optim.NAdam", {"betas": "0.9"}),
        ("torch.optim.NAdam", {"betas": [0.9]}),
        ("torch.optim.LBFGS", {}),
        ("torch.optim.Muon", {}),
        ("torch.optim.Optimizer", {}),
        ("pytorch_optimizer.SOAP", {"betas": [0.9, 2.0]}),
    ],
)
def test_options_it_does_not_take_are_refused_before_anything_is_written(
    config, tmp_path, path, options
):
    run = config(optimizer=path, optimizer_options=options)
    assert_refused(lambda: train(run, tmp_path / "run"), "optimizer_options")
    assert not (tmp_path / "run").exists()


def test_options_without_an_optimizer_are_refused(config):
    call = lambda: resolve(config(optimizer_options={"momentum": 0.9}))  # noqa: E731
    assert_refused(call, "optimizer_options", "needs an optimizer")


RESETS = {"reset_every": 4}
REFUSED = {
    "no moments": ("torch.optim.SGD", {}, RESETS, "reset_every", "keeps no moments"),
    "unknown": ("pytorch_optimizer.SaRA", {}, RESETS, "reset_every", "a restart is known for"),
    "partial": (
        "torch.optim.NAdam", {}, {**RESETS, "reset_strength": 0.5}, "reset_every", "as a whole",
    ),
    "pruned": (
        "torch.optim.Adamax", {}, {**RESETS, "reset_how": "magnitude"}, "reset_every", "not only",
    ),
    "carried": (
        "torch.optim.Adamax", {}, {"refactor_every": 4, "on_refactor": "transport"}, "on_refactor",
        "'exp_inf' is no average",
    ),
    "kept copies": (
        "pytorch_optimizer.ScheduleFreeAdamW", {}, {"refactor_every": 4}, "on_refactor",
        "belongs to the old factors",
    ),
    "no ordinary step": ("torch.optim.LBFGS", {}, RESETS, "optimizer", "it can't step"),
    "counts per group": (
        "pytorch_optimizer.AdamP", {}, {"per_layer": True, "clip": 0}, "per_layer", "per group",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_the_states_of_a_named_optimizer_cannot_do_is_refused_before_the_run(config, case):
    path, options, values, field, said = case
    values = {**values, "optimizer": path, "optimizer_options": options, "rank": 4}
    assert_refused(lambda: resolve(config("low-rank", **values)), field, said)


def test_merges_with_an_unknown_optimizer_are_refused(config):
    def relora(path):
        return resolve(config("relora", rank=4, optimizer=path))

    assert_refused(lambda: relora("pytorch_optimizer.SaRA"), "optimizer", "a restart is known for")
    assert relora("torch.optim.NAdam").method == "relora"


KNOWN = {
    "RAdam": ("torch.optim.RAdam", {}),
    "SGD": ("torch.optim.SGD", {"momentum": 0.9}),
    "NAdam": ("torch.optim.NAdam", {}),
    "Adagrad": ("torch.optim.Adagrad", {}),
    "AdamP": ("pytorch_optimizer.AdamP", {}),
}


@pytest.mark.parametrize(("path", "options"), KNOWN.values(), ids=KNOWN)
def test_a_reset_in_a_run_is_a_restart_of_a_named_optimizer(config, path, options):
    given = {"optimizer": path, "optimizer_options": options, "reset_params": "all", "rank": 4}
    resolved = resolve(config("low-rank", reset_every=8, recovery_steps=3, **given))
    (ours, optimizer), (theirs, other) = build(resolved), build(resolved)
    chance = torch.Generator().manual_seed(0)
    for step in range(12):
        tokens = torch.randint(200, (2, 2, 16), generator=chance)
        gradients(ours, [tuple(tokens)], resolved)
        events = update_(ours, optimizer, resolved, step)
        assert [e["parameters"] for e in events] == [len(list(ours.parameters()))] * (step == 7)
        if step == 8:  # the first after the reset
            other = adamw(*partition(theirs, resolved.target), resolved)
        gradients(theirs, [tuple(tokens)], resolved)
        set_learning_rate(other, resolved, step)
        other.step()
        other.zero_grad()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_a_reset_of_a_named_optimizer_works_from_the_command_line(text_corpus, tmp_path):
    line = "train --model tiny --num-layers 1 --vocab-size byte --batch 2 --sequence-length 16"
    line += " --steps 8 --reset-every 4 --recovery-steps 2 --eval-tokens 64 --test-tokens 64"
    line += f" --corpus {text_corpus} --out {tmp_path / 'run'} --optimizer torch.optim.SGD"
    done = CliRunner().invoke(main, [*line.split(), "--optimizer-option", "momentum=0.9"])
    assert done.exit_code == 0, done.output
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert rows.count('"event": "reset"') == 1


@pytest.mark.parametrize("method", ["galore", "muon", "loro"])
def test_methods_with_an_optimizer_refuse_another(config, method):
    call = lambda: resolve(config(method, optimizer="torch.optim.AdamW"))  # noqa: E731
    assert_refused(call, "optimizer", f"{method} brings an optimizer of its own")


def test_a_learning_rate_among_the_options_which_the_schedule_would_undo_is_refused(config):
    options = {"lr": 0.5}
    call = lambda: resolve(  # noqa: E731
        config(optimizer="torch.optim.NAdam", optimizer_options=options)
    )
    assert_refused(call, "optimizer_options", "lr")


def test_the_weight_decay_of_the_run_reaches_a_named_optimizer(config):
    named = resolve(config(optimizer="torch.optim.AdamW", weight_decay=0.125))
    assert {g["weight_decay"] for g in build(named)[1].param_groups} == {0.125}
