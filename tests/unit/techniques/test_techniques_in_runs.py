"""Merges, warm start, refactorizations and resets in runs: what each event touches and says."""

import math

import pytest
import torch
from short import QUICK, short_options

from lowrank_lab import METHODS, InputError, RunConfig, train
from lowrank_lab.layers import FactorizedLinear, lora_layers
from lowrank_lab.methods.build import build, partition
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.events import apply_
from lowrank_lab.training.gradients import gradients
from lowrank_lab.training.schedule import learning_rate
from lowrank_lab.training.step import set_learning_rate, update_

LAYERS = [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
LAYERS += [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture
def config(text_corpus):
    """Makes a resolved tiny configuration of one block."""

    def make(method, **values):
        given = {"steps": 12, "warmup": 0.0, "recovery_steps": 3, **values}
        if METHODS[method].uses_rank:
            given.setdefault("rank", 4)
        return resolve(
            RunConfig(
                model="tiny", num_layers=1, corpus=text_corpus, vocab_size="byte",
                sequence_length=8, batch=2, eval_tokens=64, test_tokens=64, method=method, **given,
            )
        )  # fmt: skip

    return make


class Walk:
    """A run step by step, with what the weights and moments were before and after each event."""

    def __init__(self, config):
        self.config, self.updates, self.events = config, 0, {}
        self.model, self.optimizer = build(config)
        self.names = dict(self.model.named_parameters())
        self.chance = torch.Generator().manual_seed(0)

    def to(self, updates):
        """Train until so many updates are done, with the events after each of them."""
        while self.updates < updates:
            tokens = torch.randint(257, (2, 9), generator=self.chance)
            set_learning_rate(self.optimizer, self.config, self.updates)
            gradients(self.model, [(tokens[:, :-1], tokens[:, 1:])], self.config)
            done = update_(self.model, self.optimizer, self.config, self.updates)
            self.updates += 1
            self.events |= {self.updates: done} if done else {}
        return self

    def weights(self):
        return {name: p.detach().clone() for name, p in self.names.items()}

    def states(self):
        """Copies of the tensors in each parameter's state, by the parameter's name."""
        return {
            name: {k: torch.as_tensor(v).clone() for k, v in self.optimizer.state[p].items()}
            for name, p in self.names.items()
            if p in self.optimizer.state
        }

    def targets(self):
        chosen = {id(p) for p in partition(self.model, self.config.target)[0]}
        return {name for name, p in self.names.items() if id(p) in chosen}


def changed(before, after):
    """Names whose tensor, or any tensor of whose state, is another one."""
    differ = {n for n in before if n not in after}
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        pairs = [(a, b)] if torch.is_tensor(a) else [(a[k], b[k]) for k in a.keys() & b.keys()]
        if any(not torch.equal(x, y) for x, y in pairs):
            differ.add(name)
    return differ


def names_of(events):
    return {step: [event["event"] for event in done] for step, done in events.items()}


def dense(model):
    return {
        n: m.dense_weight() for n, m in model.named_modules() if isinstance(m, FactorizedLinear)
    }


# ReLoRA's merges


def test_merges_come_at_their_period_and_not_at_the_end(config):
    walk = Walk(config("relora", method_options={"merge_every": 4})).to(12)
    assert names_of(walk.events) == {4: ["merge"], 8: ["merge"]}
    said = {"event": "merge", "layers": 7, "moments": "scale", "parameters": 14}
    assert walk.events[4] == [said]


def test_a_merge_keeps_the_weight_and_starts_new_factors_and_moments(config):
    walk = Walk(config("relora", method_options={"merge_every": 4})).to(3)
    frozen = {n: layer.base_weight.clone() for n, layer in lora_layers(walk.model)}
    assert changed({n: m.base_weight for n, m in lora_layers(walk.model)}, frozen) == set()
    before, W = walk.states(), dense(walk.model)
    done = apply_("merge", walk.model, walk.optimizer, walk.config, 4)
    assert done["parameters"] == 14
    for name, layer in lora_layers(walk.model):
        torch.testing.assert_close(layer.dense_weight(), W[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(layer.base_weight, frozen[name])
        assert not layer.B.any()
        assert layer.A.abs().max() <= 1 / math.sqrt(layer.in_features)
    after = walk.states()
    assert changed(before, after) == {f"{n}.{f}" for n in LAYERS for f in "BA"}
    assert not any(after[f"{n}.{f}"][k].any() for n in LAYERS for f in "BA" for k in MOMENTS)


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_merges_may_prune_the_factors_moments(config, how):
    options = {"merge_every": 4, "merge_moments": how, "merge_share": 0.75}
    walk = Walk(config("relora", method_options=options)).to(3)
    walk.optimizer.zero_grad()
    before = walk.states()
    done = apply_("merge", walk.model, walk.optimizer, walk.config, 4)
    assert done == {"event": "merge", "layers": 7, "moments": how, "parameters": 14}
    after = walk.states()
    assert changed(before, after) == {f"{n}.{f}" for n in LAYERS for f in "BA"}
    assert all(torch.equal(after[n]["step"], before[n]["step"]) for n in after)
    for f in ("q_proj.B", "q_proj.A"):
        m = after[f"model.layers.0.self_attn.{f}"]["exp_avg"]
        assert m.count_nonzero() <= round(0.25 * m.numel())


def test_two_merges_draw_different_factors_and_two_runs_the_same(config):
    made = config("relora", method_options={"merge_every": 4})
    walks = [Walk(made).to(3), Walk(made).to(3)]
    drawn = []
    for updates in (4, 8):
        for walk in walks:
            apply_("merge", walk.model, walk.optimizer, made, updates)
        first, second = ({n: m.A.clone() for n, m in lora_layers(w.model)} for w in walks)
        assert not changed(first, second)
        drawn.append(first)
    assert changed(*drawn) == set(LAYERS)


def test_the_learning_rate_recovers_after_a_merge(config):
    made = config("relora", steps=16, method_options={"merge_every": 5}, lr=1.0)
    rates = [learning_rate(step, made) for step in range(16)]

    def cosine(step):
        return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * step / 16))

    for merge in (5, 10):
        expected = [cosine(merge + 3) * share for share in (0.001, 0.5005, 1.0)]
        assert rates[merge : merge + 3] == pytest.approx([*expected], rel=1e-12)
    others = [step for step in range(15) if step not in (5, 6, 7, 10, 11, 12)]
    assert [rates[s] for s in others] == pytest.approx([cosine(s) for s in others], rel=1e-12)


def test_a_saved_run_has_the_merges_and_the_recovery_in_its_rows(config, tmp_path):
    made = config("relora", method_options={"merge_every": 4})
    rows = train(made, tmp_path / "run").metrics
    assert [[e["event"] for e in done] for done in rows["events"]] == [
        ["merge"] if step in (4, 8) else [] for step in range(1, 13)
    ]
    assert rows["lr"].tolist() == [learning_rate(step, made) for step in range(12)]
    assert rows["lr"][4] == pytest.approx(0.001 * rows["lr"][7], rel=1e-12)


# ReLoRA's warm start


@pytest.fixture
def warm(config):
    options = {"warm_start": 5, "merge_every": 4}
    return Walk(config("relora", method_options=options, recovery_steps=0))


def test_the_dense_weights_train_during_the_warm_start_alone(warm):
    W = {f"{n}.base_weight" for n in LAYERS}
    factors = {f"{n}.{f}" for n in LAYERS for f in "BA"}
    everything = set(warm.names)
    start = warm.weights()
    middle = warm.to(5).weights()
    assert changed(start, middle) == everything - factors
    later = warm.to(7).weights()  # before the next merge
    assert changed(middle, later) == everything - W


def test_the_states_of_the_dense_weights_are_freed_after_the_warm_start(warm):
    W = {f"{n}.base_weight" for n in LAYERS}
    factors = {f"{n}.{f}" for n in LAYERS for f in "BA"}
    assert set(warm.to(4).states()) == set(warm.names) - factors
    assert set(warm.to(5).states()) == set(warm.names) - factors - W
    assert set(warm.to(6).states()) == set(warm.names) - W
    assert all(warm.names[name].grad is None for name in W)


def test_no_merge_happens_before_any_factor_is_trained(warm):
    warm.to(12)
    assert names_of(warm.events) == {5: ["warm-start-ends"], 8: ["merge"]}
    assert warm.events[5] == [{"event": "warm-start-ends", "layers": 7}]


@pytest.mark.parametrize("period", ["merge_every", "reset_every"])
def test_the_learning_rate_does_not_recover_from_what_the_warm_start_left_out(config, period):
    options = {"warm_start": 6, "merge_every": 11}
    values = {"reset_every": 4} if period == "reset_every" else {}
    options |= {"merge_every": 4} if period == "merge_every" else {}
    made = config("relora", method_options=options, schedule="constant", lr=1.0, **values)
    rates = [learning_rate(step, made) for step in range(11)]
    assert rates[:8] == [1.0] * 8
    assert rates[8:] == pytest.approx([0.001, 0.5005, 1.0])


def test_a_warm_run_goes_on_after_interruptions_as_if_nothing_had_happened(config, tmp_path):
    made = config("relora", method_options={"warm_start": 5, "merge_every": 4}, checkpoint_every=1)
    whole = train(made, tmp_path / "whole")
    for stop in (3, 5, 6, 8):

        def on_step(row, stop=stop):
            if row["step"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(made, tmp_path / "cut", on_step=on_step)
    assert train(made, tmp_path / "cut").metrics["loss"].tolist() == whole.metrics["loss"].tolist()


# Refactorization


def test_layers_without_a_product_are_named_and_left_alone(config):
    for method in ("lora", "sltrain"):
        walk = Walk(config(method, refactor_every=1))
        before = walk.weights()
        done = apply_("refactor", walk.model, walk.optimizer, walk.config, 0)
        assert done == {"event": "refactor", "layers": 0, "rank_deficient": LAYERS, "balanced": 0}
        assert changed(before, walk.weights()) == set()


def test_a_refactorization_right_after_a_merge_names_all_layers(config, tmp_path):
    made = config("relora", refactor_every=2, method_options={"merge_every": 4})
    events = train(made, tmp_path / "run").metrics.set_index("step")["events"]
    assert [e["event"] for e in events[4]] == ["merge", "refactor"]
    of_none = {"event": "refactor", "layers": 0, "rank_deficient": LAYERS, "balanced": 0}
    assert events[4][1] == of_none
    assert events[6] == [of_none | {"layers": 7, "rank_deficient": []}]


@pytest.mark.parametrize("on_refactor", ["keep", "reset", "transport"])
def test_a_refactorization_does_to_the_moments_what_it_was_told(config, on_refactor):
    walk = Walk(config("low-rank", refactor_every=3, on_refactor=on_refactor)).to(4)
    factors = {f"{n}.{f}" for n in LAYERS for f in "BA"}
    before, weights = walk.states(), walk.weights()
    done = apply_("refactor", walk.model, walk.optimizer, walk.config, 6)
    assert (done["layers"], done["rank_deficient"]) == (7, [])
    assert changed(weights, walk.weights()) == factors
    after = walk.states()
    assert changed(before, after) == (set() if on_refactor == "keep" else factors)
    emptied = [n for n in factors if not any(after[n][k].any() for k in MOMENTS)]
    assert set(emptied) == (factors if on_refactor == "reset" else set())


def test_only_refactorizations_that_reset_lower_the_learning_rate(config):
    for on_refactor, low in (("keep", []), ("transport", []), ("reset", [4, 5, 8, 9])):
        values = {"refactor_every": 4, "on_refactor": on_refactor, "schedule": "constant"}
        made = config("low-rank", lr=1.0, **values)
        assert [s for s in range(12) if learning_rate(s, made) < 1] == low


# Resets


@pytest.mark.parametrize("params", ["targets", "all"])
@pytest.mark.parametrize("method", ["full-rank", "low-rank", "galore"])
def test_resets_touch_the_parameters_they_are_told_to(config, method, params):
    walk = Walk(config(method, reset_every=3, reset_params=params)).to(2)
    before, weights = walk.states(), walk.weights()
    done = apply_("reset", walk.model, walk.optimizer, walk.config, 3)
    chosen = set(walk.names) if params == "all" else walk.targets()
    said = {"event": "reset", "how": "scale", "strength": 1.0, "parameters": len(chosen)}
    assert done == said
    after = walk.states()
    assert changed(before, after) == chosen
    assert not any(after[n][k].any() for n in chosen for k in MOMENTS)
    assert changed(weights, walk.weights()) == set()


@pytest.mark.parametrize("params", ["targets", "all"])
@pytest.mark.parametrize("how", ["magnitude", "random"])
@pytest.mark.parametrize("method", ["low-rank", "galore"])
def test_resets_may_prune_a_share_of_the_moments(config, method, how, params):
    values = {"reset_how": how, "reset_strength": 0.75, "reset_params": params}
    walk = Walk(config(method, reset_every=3, **values)).to(2)
    before = walk.states()
    done = apply_("reset", walk.model, walk.optimizer, walk.config, 3)
    chosen = set(walk.names) if params == "all" else walk.targets()
    assert done == {"event": "reset", "how": how, "strength": 0.75, "parameters": len(chosen)}
    after = walk.states()
    unseen = {"model.embed_tokens.weight"}  # most of its moments are 0 already
    assert chosen - unseen <= changed(before, after) <= chosen
    for name in walk.targets():
        m, old = after[name]["exp_avg"], before[name]["exp_avg"]
        kept = m != 0
        assert torch.equal(m[kept], old[kept])
        assert m.count_nonzero() == round(0.25 * m.numel())
        if how == "magnitude":
            assert old[kept].abs().min() >= old[~kept].abs().max()


@pytest.mark.parametrize(("method", "how"), [("galore", "scale"), ("low-rank", "magnitude")])
@pytest.mark.parametrize("moment", MOMENTS)
def test_resets_touch_the_moments_they_are_told_to(config, method, how, moment):
    values = {"reset_how": how, "reset_moments": moment}
    walk = Walk(config(method, reset_every=3, **values)).to(2)
    before = walk.states()
    done = apply_("reset", walk.model, walk.optimizer, walk.config, 3)
    assert done["parameters"] == len(walk.targets())
    other = MOMENTS[1 - MOMENTS.index(moment)]
    after = walk.states()
    for name in walk.targets():
        assert not after[name][moment].any()
        assert torch.equal(after[name][other], before[name][other])
        assert other + "_weight" not in after[name] or after[name][other + "_weight"] > 0


def test_resets_happen_at_their_period_and_are_recorded(config, tmp_path):
    values = {"reset_every": 5, "reset_how": "random", "reset_strength": 0.9}
    rows = train(config("fira", **values), tmp_path / "run").metrics.set_index("step")
    said = {"event": "reset", "how": "random", "strength": 0.9, "parameters": 7}
    assert {s: e for s, e in rows["events"].items() if e} == {5: [said], 10: [said]}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("method", ["full-rank", "low-rank", "relora", "sltrain"])
def test_one_moment_alone_is_refused_before_training_where_both_share_a_count(
    config, method, moment
):
    with pytest.raises(InputError, match=f"^reset_moments: '{moment}' is not allowed") as caught:
        config(method, reset_every=3, reset_moments=moment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", QUICK)
def test_every_method_resets_its_targets_or_refuses_to(config, method):
    values = {"rank": METHODS[method].rank or 4} if METHODS[method].uses_rank else {}
    values["method_options"] = short_options(method, 5)
    refused = None
    try:
        made = config(method, reset_every=3, **values)
    except InputError as error:
        refused = error
    if refused is not None:
        assert refused.field == "reset_every"
        return
    walk = Walk(made).to(2)
    before = walk.states()
    done = apply_("reset", walk.model, walk.optimizer, made, 3)
    assert done["parameters"] == len(walk.targets())
    assert changed(before, walk.states()) == walk.targets()


def test_a_merge_leaves_what_is_not_a_factor_alone_even_if_resets_act_on_all(config):
    values = {"reset_every": 3, "reset_params": "all", "method_options": {"merge_every": 4}}
    walk = Walk(config("relora", **values)).to(2)
    before = walk.states()
    done = apply_("merge", walk.model, walk.optimizer, walk.config, 4)
    assert done["parameters"] == 14
    assert changed(before, walk.states()) == {f"{n}.{f}" for n in LAYERS for f in "BA"}
