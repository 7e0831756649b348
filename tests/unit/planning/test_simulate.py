"""Formula, simulation and measurement of a run's memory agree. All ways to save it: tests/slow."""

import pytest
import torch
from short import QUICK

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.memory.breakdown import persistent
from lowrank_lab.memory.formulas import activation_bytes, by_formula
from lowrank_lab.methods.build import build
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.simulate import measure, simulate
from lowrank_lab.training.kinds import kind_of

AT_REST = ("weights", "frozen", "indices", "gradients", "optimizer_states", "projections")


def configured(method, model="tiny", **fields):
    techniques = {"refactor_every": 200, "reset_every": 200} if METHODS[method].has_products else {}
    return RunConfig(**{
        "model": model, "method": method, "batch": 2, "sequence_length": 32, "steps": 10_000,
        **techniques, **fields,
    })  # fmt: skip


def at_rest(breakdown):
    return {name: getattr(breakdown, name) for name in AT_REST}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", QUICK)
def test_formula_and_simulation_agree_to_the_byte(method, precision):
    config = configured(method, precision=precision)
    assert at_rest(simulate(config).persistent) == at_rest(by_formula(resolve(config)))


OPTIONS = [
    ("frugal", {"proj": "columns"}), ("frugal", {"proj": "random"}),
    ("ldadam", {"error_feedback": False}), ("cola", {"recompute": True}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=str)
def test_formula_and_simulation_agree_with_options_that_change_what_is_kept(method, options):
    config = configured(method, precision="bf16", method_options=options)
    assert at_rest(simulate(config).persistent) == at_rest(by_formula(resolve(config)))


STEPPED = [(name, {}) for name in ("full-rank", "low-rank", "galore", "loro", "ldadam")]


@pytest.mark.parametrize(("method", "options"), [*STEPPED, OPTIONS[0], OPTIONS[3]], ids=str)
def test_the_simulated_step_is_the_measured_one(method, options):
    config = configured(method, method_options=options)
    simulated, measured = simulate(config), measure(config)
    assert at_rest(simulated.persistent) == at_rest(measured.persistent)
    assert simulated.steps.keys() == measured.steps.keys()
    for kind, trace in simulated.steps.items():
        assert trace.peak == measured.steps[kind].peak
        assert abs(trace.peak.total / measured.allocated[kind] - 1) < 0.03


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-bf16"])
@pytest.mark.parametrize("model", ["tiny", "9m"])
def test_activations_of_dense_models_follow_their_formula_to_the_byte(model, precision, frugal):
    config = configured(
        "full-rank", model, precision=precision, activation_checkpointing=frugal,
        batch=4, gradient_accumulation=2,
    )  # fmt: skip
    assert simulate(config).steps["next"].kept.activations == activation_bytes(resolve(config))


def test_there_is_no_rule_for_the_activations_of_factors():
    assert activation_bytes(resolve(configured("low-rank"))) is None


def test_a_simulation_allocates_nothing_and_leaves_torch_as_it_was():
    state = torch.random.get_rng_state()
    account = simulate(configured("full-rank", "13b", precision="bf16", batch=1))
    assert account.persistent.weights > 2 * 12e9
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(torch.zeros(1)) is torch.Tensor


def test_steps_of_each_kind_are_simulated():
    config = configured("relora", method_options={"warm_start": 100, "merge_every": 200})
    kinds = list(simulate(config).steps)
    assert kinds[:2] == ["first", "next"]
    assert "warm-start-ends" in kinds
    assert "merge + refactor + reset" in kinds
    assert list(simulate(configured("galore")).steps) == ["first", "next", "refresh"]
    assert list(simulate(configured("loro", refactor_every=0, reset_every=0)).steps) == [
        "first", "next", "exact",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "kind"),
    [(0, "first"), (1, "next"), (199, "refactor + reset"), (200, "next"), (499, "exact")],
)
def test_the_kind_of_a_step_says_what_sets_it_apart(step, kind):
    assert kind_of(resolve(configured("loro")), step) == kind


def test_on_cuda_blocks_are_rounded_and_attention_is_flash():
    config = configured("full-rank", precision="bf16", batch=4, sequence_length=128)
    cpu, cuda = simulate(config), simulate(config, "cuda")
    assert cpu.persistent == cuda.persistent
    assert all(block.bytes % 512 == 0 for block in cuda.steps["next"].blocks)
    assert any("CUDA" in what for what in cuda.excluded)


def test_a_device_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="device"):
        simulate(configured("full-rank"), "tpu")


@pytest.mark.parametrize("method", QUICK)
def test_the_memory_of_a_run_is_that_of_its_simulation(method, tmp_path):
    from lowrank_lab.training.loop import train

    config = configured(
        method, steps=6, refactor_every=0, reset_every=4 if METHODS[method].layers else 0,
        corpus="markov", vocab_size=64, batch=4, warmup=0, eval_tokens=64, test_tokens=64,
        recovery_steps=2,
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    rows = run.metrics
    simulated = simulate(run.config)
    expected = [simulated.steps[kind_of(run.config, step)].peak.total for step in range(6)]
    # The batch comes from the corpus there, as views of what numpy holds.
    batch = 2 * 8 * config.batch * config.sequence_length
    differences = [b - a for a, b in zip(rows["peak_memory_bytes"], expected, strict=True)]
    assert all(0 <= difference <= batch for difference in differences)
    assert run.memory["peak"] == rows["peak_memory_bytes"][0]
    found = at_rest(persistent(*build(run.config)))
    assert run.memory["weights"] == found["weights"]
